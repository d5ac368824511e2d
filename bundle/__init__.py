"""What a machine without a network needs, made here and installed there."""
