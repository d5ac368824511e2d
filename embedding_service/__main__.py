"""`python -m embedding_service`."""

import sys

from embedding_service import cli

sys.exit(cli.main())
