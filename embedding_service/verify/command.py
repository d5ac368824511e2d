"""The command line of `embedding-service verify`, and its report."""

import sys
from collections.abc import Sequence

import msgspec

from embedding_service.errors import StartupError
from embedding_service.inference.source import DEFAULT_MODEL
from embedding_service.server.cli import parser_of
from embedding_service.settings import environment

DIFFERS, CANNOT = 3, 2
EPILOG = """\
The API is found by asking: this service's own, Text Embeddings Inference, OpenAI, Ollama or Cohere.

exit codes: 0 the vectors are the same; 3 they differ; 2 they could not be compared"""


def execute(arguments: Sequence[str]) -> int:
    """Compare a server with the model; returns the exit code."""
    parser = parser_of(
        "embedding-service verify",
        "Compare the vectors of a running server with those of SentenceTransformer.encode.",
        EPILOG,
    )
    parser.add_argument("--url", required=True, help="the server, as http://127.0.0.1:8001")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="its model: a Hugging Face name or a folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--key", help="an API key")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference of a number (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    given = parser.parse_args(arguments)
    # Imported here, so that --help is fast.
    from embedding_service.verify.oracle import Oracle
    from embedding_service.verify.probes import Verifier
    from embedding_service.verify.server import Server

    try:
        environment.start()
        server = Server(given.url, given.key, given.model)
        oracle = Oracle(given.model, given.revision)
    except StartupError as error:
        print(error, file=sys.stderr)
        return CANNOT
    api, results = server.api, []

    def say(line: str) -> None:
        if not given.json:
            print(line, flush=True)

    say(f"{given.url} ({api.title}, /{api.path}) and SentenceTransformer({given.model!r})")
    say(f"\n{'probe':<22}{'texts':>6}{'largest difference':>21}{'lowest cosine':>16}")
    for result in Verifier(server, oracle, given.tolerance).run():
        results.append(result)
        say(str(result))
    server.close()
    faults = [result.finding for result in results if result.finding]
    findings = sorted(dict.fromkeys(faults), key=faults.count, reverse=True)
    compared = any(result.refused is None for result in results)
    if given.json:
        report = {
            "url": given.url,
            "api": api.title,
            "model": given.model,
            "tolerance": given.tolerance,
            "same": compared and not findings,
            "findings": findings,
            "probes": results,
        }
        print(msgspec.json.format(msgspec.json.encode(report), indent=1).decode())
    if not compared:
        say("\nEverything was refused.")
        return CANNOT
    if findings:
        say("\nThe vectors differ: " + "; ".join(findings))
        return DIFFERS
    say(f"\nNo vector differs by more than {given.tolerance:g}.")
    return 0
