"""The command line of `embedding-service verify`, and its report."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import msgspec

from embedding_service.errors import StartupError
from embedding_service.inference.source import DEFAULT_MODEL
from embedding_service.settings import environment

DIFFERS, CANNOT = 3, 2
EPILOG = """\
The API is found by asking: this service's own, Text Embeddings Inference, OpenAI, Ollama or Cohere.

exit codes: 0 the vectors are the same; 3 they differ; 2 they could not be compared"""


def execute(arguments: Sequence[str]) -> int:
    """Compare a server with the model; returns the exit code."""
    parser = argparse.ArgumentParser(
        "embedding-service verify",
        description="Compare the vectors of a running server with those of SentenceTransformer.encode.",
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    from embedding_service.verify.probes import Result, Verifier
    from embedding_service.verify.server import Server

    try:
        environment.start()
        server = Server(given.url, given.key, given.model)
        oracle = Oracle(given.model, given.revision)
    except StartupError as error:
        print(error, file=sys.stderr)
        return CANNOT
    results: list[Result] = []
    if not given.json:
        print(
            f"{given.url} ({server.api.title}, /{server.api.path}) and SentenceTransformer({given.model!r})"
        )
        print(f"\n{'probe':<22}{'texts':>6}{'largest difference':>21}{'lowest cosine':>16}")
    for result in Verifier(server, oracle, given.tolerance).run():
        results.append(result)
        if not given.json:
            print(_line(result), flush=True)
    server.close()
    findings = [finding for finding, _ in Counter(r.finding for r in results if r.finding).most_common()]
    compared = any(result.refused is None for result in results)
    report = {
        "url": given.url,
        "api": server.api.title,
        "model": given.model,
        "tolerance": given.tolerance,
        "same": compared and not findings,
        "findings": findings,
        "probes": results,
    }
    if given.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=1).decode())
    elif findings:
        print("\nThe vectors differ: " + "; ".join(findings))
    else:
        print(
            f"\nNo vector differs by more than {given.tolerance:g}."
            if compared
            else "\nEverything was refused."
        )
    return CANNOT if not compared else DIFFERS if findings else 0


def _line(result: "msgspec.Struct") -> str:
    facts = msgspec.structs.asdict(result)
    head = f"{facts['name']:<22}{facts['texts']:>6}"
    if facts["refused"]:
        return f"{head}  not compared: {facts['refused'][:90]}"
    numbers = f"{facts['largest_difference']:>21.1e}{facts['lowest_cosine']:>16.7f}"
    return f"{head}{numbers}  {facts['finding'] or ''}".rstrip()
