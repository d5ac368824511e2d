"""Tests of `embedding-service verify`."""
