"""The model's half: it uses numpy, torch and threads, and knows no HTTP."""
