"""Parses `.env` files strictly: an invalid line is an error with its number, and is never skipped."""

import io
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

from embedding_service.errors import ConfigError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def find(folders: Collection[Path]) -> Path | None:
    """The `.env` of the first folder that has one, even if it is a broken link."""
    for folder in folders:
        if os.path.lexists(folder / ".env"):
            return (folder / ".env").absolute()
    return None


def read(file: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the file. `${NAME}` is looked up in `environ`, then in the lines above.

    Raises ConfigError.
    """
    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(_text(file))):
        where = f"{file}, line {_line(binding)}"
        if binding.error:
            raise ConfigError(f"{where}: this is not NAME=value. A quoted value needs its closing quote")
        if binding.key is None:
            continue  # a comment, or nothing
        if not NAME.fullmatch(binding.key):
            raise ConfigError(f"{where}: {binding.key!r} is not a variable name; write NAME=value")
        if binding.value is None:
            raise ConfigError(f"{where}: {binding.key} has no value; write {binding.key}=value")
        values[binding.key] = _expanded(binding.value, values | dict(environ), f"{where}: {binding.key}")
    return values


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ConfigError(f"{file}, line 1: the file is not UTF-8 but looks like UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}, line {line}: the file is not UTF-8; save it as UTF-8") from None


def _line(binding: Binding) -> int:
    """The line number of the name; the parser's own is that of the blank lines before it."""
    text = binding.original.string
    before = text[: len(text) - len(text.lstrip())]
    return binding.original.line + len(re.findall(r"\r\n|\n|\r", before))


def _expanded(value: str, known: Mapping[str, str], where: str) -> str:
    atoms = list(parse_variables(value))
    for atom in atoms:
        # Taking it as empty would be a guess, and with empty API_KEYS anybody may use the service.
        if isinstance(atom, Variable) and atom.default is None and atom.name not in known:
            raise ConfigError(
                f"{where} refers to ${{{atom.name}}}, which is not set; ${{{atom.name}:-}} means empty then"
            )
    return "".join(atom.resolve(known) for atom in atoms)
