"""The room that owns the model: it knows numpy, torch and threads, and never HTTP."""
