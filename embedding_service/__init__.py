"""An embedding service: one SentenceTransformer model behind HTTP, shared by every web worker."""

__version__ = "0.2.0"
