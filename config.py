"""The settings, for code that says `import config`; embedding_service/config.py declares them."""

from collections.abc import Mapping

from embedding_service import environment
from embedding_service.config import Config
from embedding_service.config import load as _load
from embedding_service.errors import ConfigError

__all__ = ["Config", "ConfigError", "load"]


def load(variables: Mapping[str, str] | None = None) -> Config:
    """The settings from these variables, by default from the environment and `.env`. Raises ConfigError."""
    return environment.start().settings if variables is None else _load(variables)
