"""The settings, for code that says `import config`; embedding_service/settings/config.py declares them."""

from collections.abc import Mapping

from embedding_service.errors import ConfigError
from embedding_service.settings import environment
from embedding_service.settings.config import Config
from embedding_service.settings.config import load as _load

__all__ = ["Config", "ConfigError", "load"]


def load(variables: Mapping[str, str] | None = None) -> Config:
    """The settings from these variables, by default from the environment and `.env`. Raises ConfigError."""
    return environment.start().settings if variables is None else _load(variables)
