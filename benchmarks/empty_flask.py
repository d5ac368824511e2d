"""A view that does nothing, which measures the cost of Flask and gunicorn alone.

gunicorn -w 1 --threads 32 empty_flask:app
"""

from flask import Flask

app = Flask(__name__)


@app.get("/health")
def health() -> str:
    return ""


@app.post("/embed")
def embed() -> str:
    return ""
