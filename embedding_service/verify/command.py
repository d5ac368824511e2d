"""The command line of `embedding-service verify`, and its report."""

import sys
from collections.abc import Sequence

import msgspec

from embedding_service.errors import StartupError
from embedding_service.inference.source import DEFAULT_MODEL
from embedding_service.server.cli import parser_of
from embedding_service.settings import environment

DIFFERS, CANNOT = 3, 2
DESCRIPTION = "Compare the vectors of a running server with those of SentenceTransformer.encode."
EPILOG = """\
The API is found by asking: this service's own, Text Embeddings Inference, OpenAI, Ollama or Cohere.

exit codes: 0 the vectors are the same; 3 they differ; 2 they could not be compared"""


def execute(arguments: Sequence[str]) -> int:
    """Compare a server with the model; returns the exit code."""
    parser = parser_of("embedding-service verify", DESCRIPTION, EPILOG)
    parser.add_argument("--url", required=True, help="the server, as http://127.0.0.1:8001")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="its model: a Hugging Face name or a folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--key", help="an API key")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference (%(default)s)")
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
    lines = [f"{given.url} ({server.api.title}, /{server.api.path}) and SentenceTransformer({given.model!r})"]
    lines += ["", f"{'probe':<22}{'texts':>6}{'largest difference':>21}{'lowest cosine':>16}"]
    results = []
    for result in Verifier(server, oracle, given.tolerance).run():
        results.append(result)
        if not given.json:
            print(*lines, result, sep="\n", flush=True)
        lines = []
    server.close()
    faults = [result.finding for result in results if result.finding]
    findings = sorted(dict.fromkeys(faults), key=faults.count, reverse=True)
    code, verdict = 0, f"No vector differs by more than {given.tolerance:g}."
    if findings:
        code, verdict = DIFFERS, "The vectors differ: " + "; ".join(findings)
    elif all(result.refused for result in results):
        code, verdict = CANNOT, "Everything was refused."
    if given.json:
        report = {
            "url": given.url,
            "api": server.api.title,
            "model": given.model,
            "tolerance": given.tolerance,
        }
        report |= {"same": code == 0, "findings": findings, "probes": results}
        verdict = msgspec.json.format(msgspec.json.encode(report), indent=1).decode()
    print(verdict if given.json else f"\n{verdict}")
    return code
