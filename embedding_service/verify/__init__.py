"""`embedding-service verify`: a running server's vectors beside those of SentenceTransformer.encode."""
