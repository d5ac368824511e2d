"""The settings of Text Embeddings Inference (TEI) in this service's words.

They count if MODEL_ID is among them, or as options of `serve`; this service's own settings win.
https://huggingface.co/docs/text-embeddings-inference/cli_arguments
"""

import json
from collections.abc import Mapping

from embedding_service.errors import ConfigError
from embedding_service.settings.config import BOOLEANS

OURS = {
    "MODEL_ID": "EMBEDDING_MODEL",
    "REVISION": "MODEL_REVISION",
    "MAX_CLIENT_BATCH_SIZE": "MAX_TEXTS_PER_REQUEST",
    "AUTO_TRUNCATE": "DEFAULT_OVERFLOW",
    "DEFAULT_PROMPT": "PROMPTS",
    "API_KEY": "API_KEYS",
    "PAYLOAD_LIMIT": "MAX_BODY_BYTES",
    "JSON_OUTPUT": "LOG_FORMAT",
    "CORS_ALLOW_ORIGIN": "CORS_ORIGINS",
    "OTLP_ENDPOINT": "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTLP_SERVICE_NAME": "OTEL_SERVICE_NAME",
}

# Equal in both, so that they need a translation only as options.
SAME = ("DEFAULT_PROMPT_NAME", "DTYPE", "MAX_CONCURRENT_REQUESTS", "SERVED_MODEL_NAME")

UNSUPPORTED = {
    "DENSE_PATH": "modules.json of the model says which modules it has",
    "DISABLE_SPANS": "without OTLP_ENDPOINT there are no spans",
    "HF_API_TOKEN": "use HF_TOKEN",
    "HUGGINGFACE_HUB_CACHE": "use HF_HOME",
    "MAX_BATCH_REQUESTS": "use BATCH_SIZE",
    "MAX_BATCH_TOKENS": "use BATCH_SIZE",
    "PROMETHEUS_PORT": "metrics are at /metrics, on the port of the service",
    "TOKENIZATION_WORKERS": "the tokenizer uses the cores that it has",
    "UDS_PATH": "use gunicorn's option -b unix:PATH",
}

# All but the equal ones need a translation, wherever they are given.
TRANSLATED = (*OURS, *UNSUPPORTED, "POOLING")
OPTIONS = (*TRANSLATED, *SAME)

BOOLEAN = {
    "AUTO_TRUNCATE": {"true": "truncate", "false": "error"},
    "JSON_OUTPUT": {"true": "json", "false": "text"},
}


def translate(given: Mapping[str, str], options: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What to add to the variables `given`, and a line for each name; `options` are those of `serve`.

    Raises ConfigError for a value that would change the vectors, or that is not allowed.
    """
    if not given.get("MODEL_ID") and not options.keys() & {*TRANSLATED}:
        return {}, []
    if pooling := given.get("POOLING"):
        raise ConfigError(
            f"POOLING={pooling!r} is not supported: the model's own configuration says how it pools"
        )
    added: dict[str, str] = {}
    lines = []
    for theirs, name in OURS.items():
        value = given.get(theirs, "").strip()
        if not value or given.get(name):
            continue
        if theirs in BOOLEAN:
            translated = BOOLEAN[theirs].get(BOOLEANS.get(value.lower(), value.lower()))
            if translated is None:
                raise ConfigError(f"{theirs}={value!r} is not allowed: it must be true or false")
            value = translated
        elif theirs == "DEFAULT_PROMPT":
            value = json.dumps({"default": given[theirs]})
            added["DEFAULT_PROMPT_NAME"] = "default"
        added[name] = value
        lines.append(f"{theirs} is a setting of Text Embeddings Inference; here it is {name}")
    lines += [
        f"{name} is a setting of Text Embeddings Inference and has no effect here: {reason}"
        for name, reason in UNSUPPORTED.items()
        if given.get(name)
    ]
    return added, lines
