"""gunicorn's settings for `gunicorn app:app`; they are made in embedding_service/gunicorn_conf.py."""

import sys
from pathlib import Path

# gunicorn executes this file before it applies --chdir.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from embedding_service.gunicorn_conf import *  # noqa: F403
