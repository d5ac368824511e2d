"""The files that a run writes, and a check that it overwrites no others."""

import os
import stat
from pathlib import Path

from embedding_service.errors import StartupError

ENDINGS = {".errors.jsonl": "lists of bad rows", ".chunks.jsonl": "the places of chunks"}


class Paths:
    """The files beside an output: the vectors of an unfinished one, the job that makes them, the bad rows,
    and which text and characters each row is of; the last two have one JSON object per line.
    """

    def __init__(self, output: Path) -> None:
        names = (".part", ".part.json", *ENDINGS)
        self.part, self.job, self.errors, self.chunks = (
            output.with_name(output.name + ending) for ending in names
        )


def new_path(path: Path) -> Path:
    """The temporary file that is renamed to `path` once it is complete."""
    return path.with_name(f"{path.name}.part.new")


def require_room(source: os.stat_result, output: Path, *, restart: bool) -> None:
    """Raise StartupError if the run would overwrite its input or any file that is not its own."""
    if not output.parent.is_dir():
        raise StartupError(f"{output.parent} is not a folder")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise StartupError(f"{output.parent} cannot be written to")
    for ending, use in ENDINGS.items():
        if output.name.endswith(ending):
            raise StartupError(f"{output}: names that end in {ending} are for {use}")
    paths = Paths(output)
    taken = {(source.st_dev, source.st_ino): "the input"}
    for path in (output, *vars(paths).values(), new_path(output), new_path(paths.job)):
        if path.is_symlink() and path != output:
            raise StartupError(f"{path} is a symbolic link; a run writes to a file of its own")
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(facts.st_mode):
            raise StartupError(f"{path} exists and is not a regular file")
        other = taken.setdefault((facts.st_dev, facts.st_ino), str(path))
        if other != str(path):
            raise StartupError(f"{path} is the same file as {other}; choose another output")
    if not restart and not paths.part.exists():
        for path in (output, paths.errors, paths.chunks):
            if path.exists():
                raise StartupError(f"{path} already exists; --restart replaces it")
