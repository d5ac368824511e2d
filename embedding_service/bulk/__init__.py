"""Embedding a whole file in constant memory: rows in, vectors out."""
