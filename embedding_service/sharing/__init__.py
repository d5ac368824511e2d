"""One engine for many processes: the model process, its supervisor, and what a web worker holds of it."""
