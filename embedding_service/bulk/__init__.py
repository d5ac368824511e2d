"""Embedding a whole file: rows in, vectors out, in memory that does not grow with the file."""
