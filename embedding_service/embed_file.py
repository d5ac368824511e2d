"""`python -m embedding_service.embed_file corpus.jsonl -o vectors.npy`: embed a file, row by row."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any, NoReturn, get_args

import msgspec
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from embedding_service.bulk import outputs
from embedding_service.bulk.embedders import Embedder, LocalEmbedder, Options, RemoteEmbedder, Stopped
from embedding_service.bulk.part import BadRow, PartFile
from embedding_service.bulk.paths import Paths, require_room
from embedding_service.bulk.pipeline import Patient, run
from embedding_service.bulk.rows import Row
from embedding_service.bulk.source import FORMATS, InputFile, require_texts
from embedding_service.engine import Vectors
from embedding_service.errors import StartupError
from embedding_service.inference.fingerprint import with_ranges
from embedding_service.observability import logs
from embedding_service.quantization import Precision, quantize, read_ranges
from embedding_service.settings import environment

# Exit codes; argparse itself ends with 2.
DONE, STOPPED, USAGE, SOME_BAD, INTERRUPTED = 0, 1, 2, 3, 130

SHOWN_FAILURES = 20

RESUMABLE = "\nRun the same command to resume."
NOT_RESUMABLE = "\nA stream cannot be resumed; run with --restart to start over."

DESCRIPTION = """\
Embed every row of a file: .jsonl (objects with a text field, or bare strings), .json (an array of them), .txt
(one text per line), .csv and .tsv (with a header) or .parquet, optionally compressed with gzip or
Zstandard. After an interruption, run the same command to resume."""

EXIT_CODES = """\
exit codes: 0 every row has a vector; 3 finished, but some rows are bad: they are NaN in .npy, null with
an error in .jsonl and .parquet, and listed with their lines in OUTPUT.errors.jsonl; 2 could not start;
1 stopped before the end, 130 interrupted: run the same command to resume"""

# Options that decide what a text's vector is, and names of the service's own fields.
VECTOR_OPTIONS = ("input_type", "prompt_name", "prompt", "dimensions", "overflow", "chunk_overlap")

PROG = "python -m embedding_service.embed_file"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, epilog=EXIT_CODES)
    _add_files(made)
    _add_vectors(made)
    made.add_argument("--batch", type=_positive, default=256, help="texts per request (default: 256)")
    made.add_argument(
        "--priority", choices=["background"], help="let the service's other clients go first (with --url)"
    )
    made.add_argument("--in-flight", type=_positive, default=4, help="concurrent requests (default: 4)")
    made.add_argument(
        "--give-up-after",
        type=float,
        default=600.0,
        help="stop after this many seconds without a success (default: 600)",
    )
    made.add_argument(
        "--restart", action="store_true", help="replace the output and discard an interrupted run"
    )
    return made


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="input file, or - for standard input")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="output file: .npy, .jsonl or .parquet"
    )
    parser.add_argument(
        "--url", help="URL of the service, such as localhost:8001 (default: run the model in this process)"
    )
    parser.add_argument(
        "--api-key",
        help="API key of the service; the variable API_KEY is safer, since `ps` does not show it",
    )
    parser.add_argument("--field", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="format of the input, if the file name does not show it (default for -: jsonl)",
    )
    parser.add_argument("--delimiter", help="delimiter of .csv and .tsv: one character, or tab")


def _add_vectors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input-type", choices=["query", "document"], help="use the model's prompt for this kind of text"
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt-name", help="put this prompt of the model in front of each text")
    prompts.add_argument("--prompt", help="put this text in front of each text")
    parser.add_argument(
        "--overflow",
        choices=["truncate", "error", "mean", "chunks"],
        help="what to do with texts that are too long for the model: truncate them (default), reject them, "
        "or embed them in chunks and write the mean or a row for each",
    )
    parser.add_argument(
        "--chunk-overlap", type=_positive, help="maximum number of tokens that neighbouring chunks share (0)"
    )
    parser.add_argument("--dimensions", type=_positive, help="truncate the vectors to this many dimensions")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="number format of the vectors (default: float32); int8 and uint8 need the setting INT8_RANGES",
    )


class Work(msgspec.Struct):
    """A run, ready to begin."""

    source: InputFile
    rows: Iterator[Row]
    total: int | None
    embedder: Patient
    part: PartFile
    convert: outputs.Convert | None


def main(given: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser(prog).parse_args(given)
    try:
        work = _prepare(arguments)
    except StartupError as error:
        print(error, file=sys.stderr)
        return USAGE
    except OSError as error:
        print(f"{error.filename or arguments.input}: {error.strerror or error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("Interrupted before the start.", file=sys.stderr, flush=True)
        return INTERRUPTED
    advice = NOT_RESUMABLE if work.source.is_stream else RESUMABLE
    try:
        return _embed(arguments, work)
    except (StartupError, Stopped, OSError) as error:
        # From here on a StartupError means that the rest of the input cannot be read.
        ending = "" if isinstance(error, StartupError) else advice
        print(f"Stopped: {error}{ending}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"Interrupted.{advice}", file=sys.stderr, flush=True)
        return INTERRUPTED


def _prepare(arguments: argparse.Namespace) -> Work:
    outputs.writer(arguments.output)
    if arguments.chunk_overlap and arguments.overflow not in ("mean", "chunks"):
        raise StartupError("--chunk-overlap needs --overflow mean or --overflow chunks")
    source = InputFile(arguments.input, arguments.field, arguments.format, arguments.delimiter)
    require_room(source.stat, arguments.output, restart=arguments.restart)
    if source.is_stream and Paths(arguments.output).part.exists() and not arguments.restart:
        raise StartupError(f"an unfinished run cannot resume from {source.name}; --restart starts over")
    rows = require_texts(source.rows())
    size, digest = source.identify()
    total = source.count()
    options = {name: getattr(arguments, name) for name in VECTOR_OPTIONS}
    fields = options | {"priority": arguments.priority}
    fields = {name: value for name, value in fields.items() if value is not None}
    embedder = Patient(
        _embedder(arguments, fields),
        arguments.give_up_after,
        lambda message: tqdm.write(message, file=sys.stderr),
    )
    job = {
        "input_bytes": size,
        "input_hash": digest,
        "format": source.format,
        "delimiter": source.delimiter,
        "field": arguments.field,
        "model": embedder.description.model_name,
        "fingerprint": embedder.description.fingerprint,
        "dimension": embedder.dimension,
        **options,
    }
    convert = _convert(arguments.precision, embedder)
    part = PartFile(arguments.output, job, restart=arguments.restart)
    rest = dropwhile(lambda row: row.number < part.texts, rows)
    return Work(source, rest, total, embedder, part, convert)


def _convert(precision: Precision, embedder: Patient) -> outputs.Convert | None:
    """A function that converts vectors to the number format; None for float32.

    Raises StartupError if int8 or uint8 has no ranges for this model.
    """
    if precision == "float32":
        return None
    ranges = None
    if precision in ("int8", "uint8"):
        path = environment.current().settings.int8_ranges
        if path is None:
            raise StartupError(
                f"--precision {precision} needs the setting INT8_RANGES: a file that "
                "`embedding-service calibrate` writes"
            )
        ranges = read_ranges(path)
        # The second fingerprint is that of a service with these ranges.
        fingerprints = (ranges.fingerprint, with_ranges(ranges.fingerprint, ranges))
        if embedder.description.fingerprint not in fingerprints:
            raise StartupError(
                f"INT8_RANGES={path!r} was calibrated with another model or other model settings"
            )
        if len(ranges.minimum) != embedder.dimension:
            raise StartupError(
                f"INT8_RANGES={path!r} is for {len(ranges.minimum)} dimensions; "
                f"the vectors have {embedder.dimension}"
            )

    def convert(vectors: Vectors) -> npt.NDArray[Any]:
        # Bad rows are NaN, which integers cannot represent.
        numbers = vectors if precision == "float16" else np.nan_to_num(vectors)
        return quantize(numbers, precision, ranges)

    return convert


def _embed(arguments: argparse.Namespace, work: Work) -> int:
    part, truncated = work.part, 0
    with tqdm(
        total=work.total,
        initial=part.texts,
        unit=" texts",
        dynamic_ncols=True,
        # Ten updates a second would fill a log file.
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    ) as bar:
        rows = min(arguments.batch, work.embedder.description.max_client_batch_size)
        try:
            for chunk in run(work.rows, work.embedder, part, chunk_rows=rows, in_flight=arguments.in_flight):
                truncated += chunk.truncated
                bar.update(chunk.texts)
                if part.failures:
                    bar.set_postfix_str(f"{part.failures} bad", refresh=False)
        except BaseException:
            part.close()
            raise
    if work.source.has_changed((part.job["input_bytes"], part.job["input_hash"])):
        part.close()
        raise StartupError(f"{arguments.input} changed while it was being read; --restart starts over")
    part.seal()
    outputs.finish(part, arguments.output, work.convert)
    work.embedder.close()
    return _report(arguments.output, part, truncated)


def _embedder(arguments: argparse.Namespace, options: Options) -> Embedder:
    if arguments.url:
        return RemoteEmbedder(
            arguments.url, arguments.api_key or environment.current().client_api_key, options
        )
    # Imported here, because --url does not need torch.
    from embedding_service.inference.local import LocalEngine

    settings = environment.current().settings
    logs.check(settings)
    logs.setup(settings)
    engine = LocalEngine(dataclasses.replace(settings, device=settings.devices[0]))
    engine.wait_loaded()
    return LocalEmbedder(engine, options, settings.max_text_characters)


def _report(output: Path, part: PartFile, truncated: int) -> int:
    texts = f" for {part.texts} texts" if part.has_chunks else ""
    print(f"Wrote {part.rows} rows{texts} to {output}", file=sys.stderr)
    if truncated:
        print(
            f"{truncated} texts in this run were too long for the model and were truncated", file=sys.stderr
        )
    if not part.failures:
        return DONE
    print(f"{part.failures} rows are bad, listed in {part.paths.errors}:", file=sys.stderr)
    with part.paths.errors.open("rb") as file:
        for line, _ in zip(file, range(SHOWN_FAILURES), strict=False):
            failure = msgspec.json.decode(line, type=BadRow)
            print(f"  line {failure.line}: {failure.error}", file=sys.stderr)
    if part.failures > SHOWN_FAILURES:
        print("  …", file=sys.stderr)
    return SOME_BAD


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def execute(given: Sequence[str] | None = None, prog: str = PROG) -> NoReturn:
    """Run the command line and end the process."""
    code = main(given, prog)
    sys.stdout.flush()
    sys.stderr.flush()
    logs.writer.flush()
    # sys.exit would wait for requests in flight, whose answers are no longer needed.
    os._exit(code)


if __name__ == "__main__":
    execute()
