"""Gunicorn's settings for `gunicorn app:app`; embedding_service/server/gunicorn_conf.py makes them."""

import sys
from pathlib import Path

# gunicorn executes this file before it applies --chdir.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from embedding_service.server.gunicorn_conf import *  # noqa: F403
