"""The HTTP half: it knows Flask and JSON, and never the model."""
