"""The command line: `embedding-service serve`, `embed` and others; `python app.py` is `serve`."""

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from embedding_service import __version__
from embedding_service.errors import StartupError
from embedding_service.observability import logs
from embedding_service.settings import config, environment, tei_names
from embedding_service.sharing.settings import EX_CONFIG

DESCRIPTION = "Text embeddings over HTTP."

COMMANDS = """\
commands:
  serve           serve over HTTP (by default on port 8001 of every address)
  embed           embed the rows of a file
  download        fetch a model into the cache, check it, and exit
  calibrate       find the ranges for int8 and uint8 vectors
  verify          compare any running server with SentenceTransformer.encode

Run `embedding-service COMMAND --help` for the options of a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = parser_of("embedding-service", DESCRIPTION, COMMANDS)
    parser.add_argument(
        "command", choices=["serve", "embed", "download", "calibrate", "verify"], metavar="COMMAND"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Everything after the command belongs to it, including --help.
    command = parser.parse_args(given[:1] or ["--help"]).command
    if command == "embed":
        from embedding_service import embed_file

        embed_file.execute(given[1:], prog="embedding-service embed")
    if command == "verify":
        from embedding_service.verify import command as verify

        return verify.execute(given[1:])
    if command == "serve":
        return serve(given[1:], prog="embedding-service serve")
    try:
        (download if command == "download" else calibrate)(given[1:])
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return EX_CONFIG
    except StartupError as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    return 0


def serve(arguments: Sequence[str], prog: str = "app.py") -> int:
    """Serve until the process is told to stop; returns the exit code."""
    lines = ["settings, from the environment or a .env file:"]
    for field in config.FIELDS:
        default = "" if (value := config.default_of(field)) is None else f" ({value})"
        lines.append(f"  {field.name.upper()}  {field.metadata['description']}{default}")
    parser = parser_of(prog, "Serve text embeddings over HTTP.", "\n".join(lines))
    parser.add_argument("--host", metavar="ADDRESS", help="the setting HOST")
    parser.add_argument("--port", metavar="N", help="the setting PORT")
    # Text Embeddings Inference's options, so that its command lines work.
    parser.add_argument("--hostname", dest="host", help=argparse.SUPPRESS)
    for name in tei_names.OPTIONS:
        option = f"--{name.lower().replace('_', '-')}"
        parser.add_argument(option, nargs="?", const="true", dest=name.lower(), help=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    try:
        started = environment.start(**{name.upper(): v for name, v in given.items() if v is not None})
        _run(started.settings)
    except StartupError as error:
        logs.refuse(error, environment.log_format())
        return EX_CONFIG
    return 0


def _run(settings: config.Config) -> None:
    """Run gunicorn in this process; where it cannot run (Windows), Werkzeug and the model."""
    if os.name != "posix" or not importlib.util.find_spec("gunicorn"):
        from embedding_service.server.app import build

        build().run(settings.host, settings.port, threaded=True)
        return
    from gunicorn.app.base import Application

    class Service(Application):  # type: ignore[misc]
        def load_config(self) -> None:
            # With our configuration instead of sys.argv.
            self.load_config_from_module_name_or_filename("python:embedding_service.server.gunicorn_conf")
            extra = self.cfg.parser().parse_args(self.cfg.get_cmd_args_from_env())
            for name, value in vars(extra).items():
                if value is not None and name != "args":
                    self.cfg.set(name, value)

        def load(self) -> Any:
            from embedding_service.server.app import build  # after the model has begun to load

            return build()

    Service().run()


def download(arguments: Sequence[str]) -> None:
    """Fetch a model into the cache and check its files. Raises StartupError."""
    parser = parser_of(
        "embedding-service download",
        "Fetch a model into the cache (HF_HOME), compare its files with the hub's hashes, prepare it in "
        "CACHE_FOLDER for a fast start, if it runs on the CPU, and exit. The settings are those of "
        "the service.",
        "exit codes: 0 the model is complete; 78 it is not available or its files are damaged",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face name, as in EMBEDDING_MODEL")
    parser.add_argument("--revision", help="branch, tag or commit, as in MODEL_REVISION")
    given = parser.parse_args(arguments)
    from embedding_service.inference import loading, source

    settings = dataclasses.replace(
        environment.start().settings, embedding_model=given.model, model_revision=given.revision
    )
    found = source.resolve(given.model, given.revision)
    files = source.checked(found.folder)
    if damaged := [name for name, whole in files.items() if whole is False]:
        raise StartupError(
            f"{', '.join(damaged)} in {found.folder}: damaged; delete the folder and download again"
        )
    print(f"{given.model} is in {found.folder} ({found.origin})")
    if found.revision is None:
        print("Nothing was downloaded.")
    else:
        unknown = sum(whole is None for whole in files.values())
        print(f"{len(files) - unknown} files match the hub's hashes; the hashes of {unknown} are unknown")
    try:
        if loading.prepare(settings):
            print(f"It is prepared in {settings.cache_folder}")
    except StartupError as error:
        print(f"It could not be prepared, and will not start: {error}", file=sys.stderr)


def calibrate(arguments: Sequence[str]) -> None:
    """Find and write the ranges for int8 and uint8. Raises OSError or StartupError."""
    parser = parser_of(
        "embedding-service calibrate",
        "Embed the lines of a text file with the configured model, and write the smallest and largest "
        "number of each dimension to a file for INT8_RANGES. A few thousand lines similar to your own texts "
        "are enough.",
        "exit codes: 0 the ranges are written; 78 the file or the model cannot be used",
    )
    parser.add_argument("texts", type=Path, metavar="TEXTS", help="text file with one text per line")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("int8-ranges.json"), help="output file (%(default)s)"
    )
    given = parser.parse_args(arguments)
    from embedding_service import calibration

    texts = calibration.read_texts(given.texts)
    ranges = calibration.ranges_of(texts, environment.start().settings)
    given.output.write_bytes(msgspec.json.encode(ranges))
    print(f"Wrote the ranges of {len(texts)} texts to {given.output}. Set INT8_RANGES={given.output}")


def parser_of(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"embedding-service {__version__}")
    return parser
