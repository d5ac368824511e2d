"""Every setting, with type, default, bounds and description; environment.py reads them."""

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from embedding_service.errors import ConfigError
from embedding_service.words import allowed

DEVICE_PATTERN = r"^(auto|(cpu|mps|cuda(:\d+)?)(,(cpu|mps|cuda(:\d+)?))*)$"

# A name, an IPv4 or an IPv6 address, but no `*`, port or URL.
HOST_PATTERN = (
    r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f.]*(%\w+)?)$"
)
HOST_ALLOWED = (
    "an IPv4 or IPv6 address or a name, without a port: 0.0.0.0 for every address, 127.0.0.1 for this "
    "machine only. For a unix socket, use gunicorn's own option: -b takes unix:/run/embedding.sock"
)


# What a browser sends as Origin: a scheme and a host without a path, or null. A star stands for the labels
# before a domain, or for any port.
ORIGIN = (
    r"(null|(?!null)[A-Za-z][A-Za-z0-9+.-]*://((\*\.)?[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])?(:(\d+|\*))?/?)"
)
ORIGINS_PATTERN = rf"^(\*|{ORIGIN}(\s*,\s*{ORIGIN})*)$"

ROUTE_PATTERN = r"^/[^\s<>?#]+$"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The settings; each is read from the environment variable with its name in capitals."""

    embedding_model: Annotated[
        str,
        Meta(min_length=1, description="Model to serve: a Hugging Face name or the path of a folder."),
    ] = "sentence-transformers/all-MiniLM-L6-v2"
    model_revision: Annotated[
        str | None, Meta(description="Branch, tag or commit of a model on the Hugging Face hub.")
    ] = None
    device: Annotated[
        str,
        Meta(
            pattern=DEVICE_PATTERN,
            extra={"allowed": "auto, cpu, mps, cuda, cuda:N, or a list such as cuda:0,cuda:1"},
            description=(
                "Where the model runs: auto (CUDA if there is one, else the CPU), cpu, mps, cuda, "
                "cuda:N, or a comma-separated list with one model process for each device."
            ),
        ),
    ] = "auto"
    cpu_fallback: Annotated[
        bool,
        Meta(description="If the CUDA device is missing, log a warning and run on the CPU."),
    ] = True
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16", "int8"],
        Meta(
            description=(
                "Number format of the weights; auto is float16 on CUDA and float32 elsewhere. On x86 CPUs, "
                "int8 is faster but slightly less accurate (it needs the package nncf), and bfloat16 "
                "may be faster; the log says if it is."
            )
        ),
    ] = "auto"
    backend: Annotated[
        Literal["auto", "torch", "openvino"],
        Meta(description="Runtime for the transformer; auto is OpenVINO on x86 CPUs and torch elsewhere."),
    ] = "auto"
    cache_folder: Annotated[
        str,
        Meta(
            min_length=1,
            description="Folder for prepared models and measured costs, which make the next start fast.",
        ),
    ] = "~/.cache/embedding-service"
    attn_implementation: Annotated[
        str | None,
        Meta(description="Attention implementation, such as sdpa or flash_attention_2."),
    ] = None
    batch_size: Annotated[
        int,
        Meta(ge=1, le=4096, description="Maximum number of full-length texts in one forward pass."),
    ] = 32
    max_seq_length: Annotated[
        int,
        Meta(
            ge=4,
            le=131072,
            description=(
                "Texts are truncated to this many tokens, or to the model's own maximum if that is lower."
            ),
        ),
    ] = 256
    host: Annotated[
        str, Meta(pattern=HOST_PATTERN, extra={"allowed": HOST_ALLOWED}, description="Address to listen on.")
    ] = "0.0.0.0"  # noqa: S104
    port: Annotated[int, Meta(ge=1, le=65535, description="Port to listen on.")] = 8001
    aip_health_route: Annotated[
        str,
        Meta(
            pattern=ROUTE_PATTERN,
            extra={"allowed": "a path such as /health"},
            description="Additional path for the health check; Vertex AI sets it.",
        ),
    ] = ""
    aip_predict_route: Annotated[
        str,
        Meta(
            pattern=ROUTE_PATTERN,
            extra={"allowed": "a path such as /predict"},
            description="Additional path for /predict; Vertex AI sets it.",
        ),
    ] = ""
    web_concurrency: Annotated[
        int, Meta(ge=1, le=64, description="Number of web worker processes; they share one model.")
    ] = 1
    max_concurrent_requests: Annotated[
        int,
        Meta(
            ge=1,
            le=65536,
            description="Maximum number of requests in flight per web worker; further requests get 429.",
        ),
    ] = 512
    max_texts_per_request: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Maximum number of texts in a request.")
    ] = 4096
    max_text_characters: Annotated[
        int, Meta(ge=1, le=100_000_000, description="Maximum number of characters in a text.")
    ] = 100_000
    prompts: Annotated[
        dict[str, str],
        Meta(
            extra={"allowed": 'a JSON object of names and texts, such as {"query": "query: "}'},
            description="Prompts by name, as a JSON object; they are added to the model's own.",
        ),
    ] = {}
    default_prompt_name: Annotated[
        str | None, Meta(description="Name of the prompt to use if a request does not name one.")
    ] = None
    served_model_name: Annotated[
        str | None,
        Meta(description="Comma-separated names of the model in the API; responses show the first."),
    ] = None
    token_ids: Annotated[
        Literal["cl100k_base", "o200k_base"] | None,
        Meta(
            description=(
                "Decode token ids on /v1/embeddings with this vocabulary, for LangChain's defaults; "
                "needs the package bpe-openai."
            )
        ),
    ] = None
    cors_origins: Annotated[
        str,
        Meta(
            pattern=ORIGINS_PATTERN,
            extra={
                "allowed": (
                    "*, or origins such as https://example.com, https://*.example.com, http://localhost:*, "
                    "chrome-extension://… and null, without a path, names in ASCII (xn--…)"
                )
            },
            description=(
                "Comma-separated origins, such as https://example.com, https://*.example.com or "
                "http://localhost:*, whose pages may call the service from a browser; * allows all."
            ),
        ),
    ] = ""
    default_overflow: Annotated[
        Literal["truncate", "error", "mean"],
        Meta(
            description=(
                "How to handle texts that are too long for the model, if a request does not say: truncate, "
                "error, or mean (of their pieces)."
            )
        ),
    ] = "truncate"
    max_body_bytes: Annotated[
        int, Meta(ge=1024, le=1 << 31, description="Maximum size of a request body in bytes.")
    ] = 32 << 20
    max_queued_tokens: Annotated[
        int,
        Meta(
            ge=1024,
            description=(
                "Maximum number of tokens that wait for the model; further requests get 429. When a request "
                "arrives, each waiting request counts for at most as many tokens as the new one, so a large "
                "request cannot block small ones."
            ),
        ),
    ] = 2_000_000
    cache_mb: Annotated[
        int,
        Meta(
            ge=0,
            le=1_048_576,
            description="Vector cache of each model process, in MiB; 0 disables it.",
        ),
    ] = 0
    int8_ranges: Annotated[
        str | None,
        Meta(
            description=(
                "File with the ranges for int8 and uint8 vectors, written by `embedding-service calibrate`."
            )
        ),
    ] = None
    request_timeout_seconds: Annotated[
        float,
        Meta(gt=0, le=3600, description="Time limit of a request, in seconds; slower requests get 504."),
    ] = 60.0
    keep_alive_seconds: Annotated[
        int,
        Meta(
            ge=1,
            le=3600,
            description=(
                "How long an idle connection stays open, in seconds. Set it higher than the idle timeout of "
                "the proxy or load balancer in front."
            ),
        ),
    ] = 75
    graceful_timeout_seconds: Annotated[
        int, Meta(ge=1, le=3600, description="Seconds that requests in flight get to finish on shutdown.")
    ] = 30
    api_keys: Annotated[
        str | None,
        Meta(
            extra={"secret": True},
            description="Comma-separated API keys; every caller must send one of them.",
        ),
    ] = None
    api_keys_file: Annotated[
        str | None,
        Meta(description="File with one API key per line, reread when it changes."),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Minimum log level.")
    ] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="Format of log lines.")] = "text"
    access_log: Annotated[bool, Meta(description="Log a line for each request.")] = False
    slow_request_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="Log a warning for each request that takes longer than this; 0 turns it off.",
        ),
    ] = 0.0
    log_file: Annotated[
        str | None,
        Meta(description="File to log to instead of standard error; reopened after log rotation."),
    ] = None
    # Not read, but known to a model process: how many there are, and how many on its device.
    model_processes: int = 1
    device_processes: int = 1

    @property
    def devices(self) -> list[str]:
        """The requested devices; each gets a model process."""
        return self.device.split(",")

    @property
    def hang_seconds(self) -> float:
        """After how long a batch counts as hung."""
        return 2 * self.request_timeout_seconds

    def of_model_process(self, index: int) -> "Config":
        """The settings of the model process for one of the devices."""
        # The first CUDA device has two names.
        ordinals = [device.removesuffix(":0") for device in self.devices]
        return msgspec.structs.replace(
            self,
            device=self.devices[index],
            model_processes=len(ordinals),
            device_processes=ordinals.count(ordinals[index]),
        )

    def is_open_at(self, host: str) -> bool:
        """Whether other machines may use the service at this address without a key."""
        if self.api_keys or self.api_keys_file or host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(host).is_loopback
        except ValueError:
            return True


def descriptions() -> dict[str, str]:
    """The description and default of each setting."""
    described: dict[str, str] = {}
    for field in FIELDS:
        value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        default = "" if value is None else f" ({value})"
        described[field.name.upper()] = _split(field.type)[1].get("description", "") + default
    return described


def load(variables: Mapping[str, str]) -> Config:
    """The settings from these variables; an empty value counts as not set.

    Raises ConfigError for the first value that is not allowed.
    """
    values: dict[str, Any] = {}
    for field in FIELDS:
        name, raw = _given(field.name.upper(), variables)
        if raw:
            values[field.name] = _convert(name, raw, field.type)
    return Config(**values)


def warnings(variables: Mapping[str, str]) -> list[str]:
    """A warning for each setting that is given by its former name."""
    return [
        f"{old} is now called {name}; the old name works until the next release"
        for name, old in OLD_NAMES.items()
        if _given(name, variables)[0] == old
    ]


def _given(name: str, variables: Mapping[str, str]) -> tuple[str, str]:
    """The value of a setting, empty if it is not set, and the name to use in messages about it."""
    for variable in (name, *PLATFORM_NAMES.get(name, ())):
        if raw := variables.get(variable, "").strip():
            return name, raw
    old = OLD_NAMES.get(name, "")
    raw = variables.get(old, "").strip()
    return (old, raw) if raw else (name, "")


def _split(wanted: Any) -> tuple[msgspec.inspect.Type, dict[str, Any]]:
    """The type of a setting, and its Meta as a dictionary."""
    kind = msgspec.inspect.type_info(wanted)
    if not isinstance(kind, msgspec.inspect.Metadata):
        return kind, {}
    return kind.type, (kind.extra_json_schema or {}) | (kind.extra or {})


FIELDS = [field for field in msgspec.structs.fields(Config) if _split(field.type)[1]]
NAMES = [field.name.upper() for field in FIELDS]

# Former names of settings.
OLD_NAMES = {"MAX_CONCURRENT_REQUESTS": "WEB_THREADS"}

# Variables with which Vertex AI configures its containers.
PLATFORM_NAMES = {"PORT": ("AIP_HTTP_PORT",)}

BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}

# Other software's names for the same values.
ALIASES = {
    "LOG_LEVEL": {"warn": "warning", "err": "error"},
    "BACKEND": {"pytorch": "torch"},
    "DTYPE": {
        "fp32": "float32",
        "f32": "float32",
        "float": "float32",
        "fp16": "float16",
        "f16": "float16",
        "half": "float16",
        "bf16": "bfloat16",
    },
}


def _convert(name: str, raw: str, wanted: Any) -> Any:
    kind, extra = _split(wanted)
    shown = "…" if extra.get("secret") else repr(raw)
    description = extra.get("description", "")
    if not raw.isprintable():
        raise ConfigError(f"{name}={shown} is not allowed: it has line breaks or bytes that are not UTF-8")
    if isinstance(kind, msgspec.inspect.BoolType):
        raw = BOOLEANS.get(raw.lower(), raw.lower())
    elif isinstance(kind, msgspec.inspect.LiteralType):
        raw = ALIASES.get(name, {}).get(raw.lower(), raw.lower())
    elif name in NORMALIZERS:
        raw = NORMALIZERS[name](raw)
    try:
        if isinstance(kind, msgspec.inspect.DictType):
            return msgspec.json.decode(raw, type=dict[str, str])
        return msgspec.convert(raw, wanted, strict=False)
    except msgspec.MsgspecError:
        wanted_value = extra.get("allowed") or allowed(kind)
        raise ConfigError(
            f"{name}={shown} is not allowed: it must be {wanted_value}. {description}"
        ) from None


def _plain_host(host: str) -> str:
    """The address without the brackets that an IPv6 address has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _plain_device(device: str) -> str:
    return re.sub(r"\s", "", device.lower())


NORMALIZERS: dict[str, Callable[[str], str]] = {"HOST": _plain_host, "DEVICE": _plain_device}
