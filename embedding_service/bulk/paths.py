"""The files that a run writes, and a check that it overwrites no others."""

import os
import stat
from pathlib import Path

from embedding_service.errors import StartupError

ERRORS = ".errors.jsonl"
CHUNKS = ".chunks.jsonl"


def part_path(output: Path) -> Path:
    """The vectors of an unfinished output."""
    return output.with_name(f"{output.name}.part")


def job_path(output: Path) -> Path:
    """The job of the unfinished output."""
    return output.with_name(f"{output.name}.part.json")


def errors_path(output: Path) -> Path:
    """The bad rows of an output, one JSON object per line."""
    return output.with_name(f"{output.name}{ERRORS}")


def chunks_path(output: Path) -> Path:
    """Which text and characters each row of an output is of, one JSON object per line."""
    return output.with_name(f"{output.name}{CHUNKS}")


def new_path(path: Path) -> Path:
    """The temporary file that is renamed to `path` once it is complete."""
    return path.with_name(f"{path.name}.part.new")


def require_room(source: os.stat_result, output: Path, *, restart: bool) -> None:
    """Raise StartupError if the run would overwrite its input or any file that is not its own."""
    if not output.parent.is_dir():
        raise StartupError(f"{output.parent} is not a folder")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise StartupError(f"{output.parent} cannot be written to")
    if output.name.endswith(ERRORS):
        raise StartupError(f"{output}: names that end in {ERRORS} are for lists of bad rows")
    if output.name.endswith(CHUNKS):
        raise StartupError(f"{output}: names that end in {CHUNKS} are for the places of chunks")
    part, job = part_path(output), job_path(output)
    errors, chunks = errors_path(output), chunks_path(output)
    taken = {(source.st_dev, source.st_ino): "the input"}
    for path in (output, part, job, errors, chunks, new_path(output), new_path(job)):
        if path.is_symlink() and path != output:
            raise StartupError(f"{path} is a symbolic link; a run writes to a file of its own")
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(found.st_mode):
            raise StartupError(f"{path} exists and is not a regular file")
        other = taken.setdefault((found.st_dev, found.st_ino), str(path))
        if other != str(path):
            raise StartupError(f"{path} is the same file as {other}; choose another output")
    if not restart and not part.exists():
        for path in (output, errors, chunks):
            if path.exists():
                raise StartupError(f"{path} already exists; --restart replaces it")
