"""`python -m embedding_service`."""

import sys

from embedding_service.server import cli

sys.exit(cli.main())
