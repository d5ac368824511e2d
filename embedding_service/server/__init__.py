"""Starts the service: the command line, gunicorn, its worker, and checks before the start."""
