"""The baseline: the simplest service, a Flask view around `encode()`.

gunicorn -w 1 --threads 32 baseline_flask:app
"""

import os
import time
from typing import Any

from flask import Flask, jsonify, request
from sentence_transformers import SentenceTransformer

app = Flask(__name__)
name = os.environ.get("EMBEDDING_MODEL", "sentence-transformers/all-MiniLM-L6-v2")
model = SentenceTransformer(name, device=os.environ.get("DEVICE", "cpu"))


@app.get("/health")
def health() -> Any:
    return jsonify(status="healthy")


@app.post("/embed")
def embed() -> Any:
    began = time.perf_counter()
    data = request.get_json()
    texts = [data["texts"]] if isinstance(data["texts"], str) else data["texts"]
    embeddings = model.encode(texts, batch_size=32, normalize_embeddings=data.get("normalize", True))
    return jsonify(
        embeddings=embeddings.tolist(),
        dimension=embeddings.shape[1],
        model=name,
        count=len(texts),
        processing_time_ms=(time.perf_counter() - began) * 1000,
    )
