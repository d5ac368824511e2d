"""The settings, for code that says `import config`; embedding_service/config.py declares them."""

from embedding_service.config import Config, load
from embedding_service.errors import ConfigError

__all__ = ["Config", "ConfigError", "load"]
