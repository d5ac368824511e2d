"""The load harness: this service beside its raw engine, a plain Flask baseline, and a peer."""
