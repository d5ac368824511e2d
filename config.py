"""The settings for code that says `import config`; they are declared in embedding_service/config.py."""

from embedding_service.config import Config, load
from embedding_service.errors import ConfigError

__all__ = ["Config", "ConfigError", "load"]
