"""Entry points: `python app.py` serves, and `gunicorn app:app` finds the Flask app here."""

import sys

if __name__ == "__main__":
    from embedding_service.server import cli

    sys.exit(cli.serve(sys.argv[1:]))

from embedding_service.server.app import build

app = build()
