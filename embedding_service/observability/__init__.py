"""Logs and metrics, counted across processes."""
