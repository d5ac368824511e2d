"""The HTTP half: it knows about Flask and JSON, and nothing about the model."""
