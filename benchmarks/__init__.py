"""The benchmarks: this service next to its raw engine, a plain Flask baseline, and a peer."""
