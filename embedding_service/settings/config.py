"""Every setting, with type, default, bounds and description; environment.py reads them."""

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec

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

Value = TypeVar("Value")


def setting(
    default: Value, description: str, *, allowed: str = "", secret: bool = False, **bounds: Any
) -> Value:
    """A setting. `allowed` says what it may be, if its type and `bounds`, those of msgspec, do not say it."""
    facts = {"description": description, "allowed": allowed, "secret": secret, "bounds": bounds}
    if isinstance(default, dict):
        return cast(Value, dataclasses.field(default_factory=dict, metadata=facts))
    return dataclasses.field(default=default, metadata=facts)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings; each is read from the environment variable with its name in capitals."""

    embedding_model: str = setting(
        "sentence-transformers/all-MiniLM-L6-v2",
        "Model to serve: a Hugging Face name or the path of a folder.",
        min_length=1,
    )
    model_revision: str | None = setting(None, "Branch, tag or commit of a model on the Hugging Face hub.")
    device: str = setting(
        "auto",
        "Where the model runs: auto (CUDA if there is one, else the CPU), cpu, mps, cuda, cuda:N, or a "
        "comma-separated list with one model process for each, in which a device may be repeated.",
        allowed="auto, cpu, mps, cuda, cuda:N, or a list such as cuda:0,cuda:1",
        pattern=DEVICE_PATTERN,
    )
    cpu_fallback: bool = setting(True, "If the CUDA device is missing, log a warning and run on the CPU.")
    dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = setting(
        "auto",
        "Number format of the weights; auto is float16 on CUDA and float32 elsewhere. On x86 CPUs, int8 "
        "is faster but slightly less accurate (it needs the package nncf), and bfloat16 may be faster; "
        "the log says if it is.",
    )
    backend: Literal["auto", "torch", "openvino"] = setting(
        "auto", "Runtime for the transformer; auto is OpenVINO on x86 CPUs and torch elsewhere."
    )
    cache_folder: str = setting(
        "~/.cache/embedding-service",
        "Folder for prepared models and measured costs, which make the next start fast.",
        min_length=1,
    )
    attn_implementation: str | None = setting(
        None, "Attention implementation, such as sdpa or flash_attention_2."
    )
    batch_size: int = setting(32, "Maximum number of full-length texts in one forward pass.", ge=1, le=4096)
    max_seq_length: int = setting(
        256,
        "Texts are truncated to this many tokens, or to the model's own maximum if that is lower.",
        ge=4,
        le=131072,
    )
    host: str = setting("0.0.0.0", "Address to listen on.", allowed=HOST_ALLOWED, pattern=HOST_PATTERN)  # noqa: S104
    port: int = setting(8001, "Port to listen on.", ge=1, le=65535)
    aip_health_route: str = setting(
        "",
        "Additional path for the health check; Vertex AI sets it.",
        allowed="a path such as /health",
        pattern=ROUTE_PATTERN,
    )
    aip_predict_route: str = setting(
        "",
        "Additional path for /predict; Vertex AI sets it.",
        allowed="a path such as /predict",
        pattern=ROUTE_PATTERN,
    )
    web_concurrency: int = setting(1, "Number of web worker processes; they share one model.", ge=1, le=64)
    max_concurrent_requests: int = setting(
        512, "Maximum number of requests in flight per web worker; further requests get 429.", ge=1, le=65536
    )
    max_texts_per_request: int = setting(4096, "Maximum number of texts in a request.", ge=1, le=1_000_000)
    max_text_characters: int = setting(
        100_000, "Maximum number of characters in a text.", ge=1, le=100_000_000
    )
    prompts: dict[str, str] = setting(  # noqa: RUF009
        {},
        "Prompts by name, as a JSON object; they are added to the model's own.",
        allowed='a JSON object of names and texts, such as {"query": "query: "}',
    )
    default_prompt_name: str | None = setting(
        None, "Name of the prompt to use if a request does not name one."
    )
    served_model_name: str | None = setting(
        None, "Comma-separated names of the model in the API; responses show the first."
    )
    token_ids: Literal["cl100k_base", "o200k_base", "model"] | None = setting(
        None,
        "The vocabulary of token ids on /v1/embeddings: one of OpenAI's, for LangChain's defaults, which "
        "needs the package bpe-openai, or the model's own.",
    )
    cors_origins: str = setting(
        "",
        "Comma-separated origins, such as https://example.com, https://*.example.com or "
        "http://localhost:*, whose pages may call the service from a browser; * allows all.",
        allowed="*, or origins such as https://example.com, https://*.example.com, http://localhost:*, "
        "chrome-extension://… and null, without a path, names in ASCII (xn--…)",
        pattern=ORIGINS_PATTERN,
    )
    default_overflow: Literal["truncate", "error", "mean"] = setting(
        "truncate",
        "How to handle texts that are too long for the model, if a request does not say: truncate, "
        "error, or mean (of their pieces).",
    )
    max_body_bytes: int = setting(32 << 20, "Maximum size of a request body in bytes.", ge=1024, le=1 << 31)
    max_queued_tokens: int = setting(
        2_000_000,
        "Maximum number of tokens that wait for the model; further requests get 429. When a request "
        "arrives, each waiting request counts for at most as many tokens as the new one, so a large "
        "request cannot block small ones.",
        ge=1024,
    )
    cache_mb: int = setting(
        0, "Vector cache of each model process, in MiB; 0 disables it.", ge=0, le=1_048_576
    )
    int8_ranges: str | None = setting(
        None, "File with the ranges for int8 and uint8 vectors, written by `embedding-service calibrate`."
    )
    request_timeout_seconds: float = setting(
        60.0, "Time limit of a request, in seconds; slower requests get 504.", gt=0, le=3600
    )
    keep_alive_seconds: int = setting(
        75,
        "How long an idle connection stays open, in seconds. Set it higher than the idle timeout of the "
        "proxy or load balancer in front.",
        ge=1,
        le=3600,
    )
    graceful_timeout_seconds: int = setting(
        30, "Seconds that requests in flight get to finish on shutdown.", ge=1, le=3600
    )
    api_keys: str | None = setting(
        None, "Comma-separated API keys; every caller must send one of them.", secret=True
    )
    api_keys_file: str | None = setting(None, "File with one API key per line, reread when it changes.")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Minimum log level.")
    log_format: Literal["text", "json"] = setting("text", "Format of log lines.")
    access_log: bool = setting(False, "Log a line for each request.")
    slow_request_seconds: float = setting(
        0.0, "Log a warning for each request that takes longer than this; 0 turns it off.", ge=0, le=3600
    )
    log_file: str | None = setting(
        None, "File to log to instead of standard error; reopened after log rotation."
    )
    # Not read, but known to a model process: its place, how many there are, and how many on its device.
    process: int = 0
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
        return dataclasses.replace(
            self,
            device=self.devices[index],
            process=index,
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


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a setting that is not given."""
    return {} if field.default is dataclasses.MISSING else field.default


def load(variables: Mapping[str, str]) -> Config:
    """The settings from these variables; an empty value counts as not set.

    Raises ConfigError for the first value that is not allowed.
    """
    values: dict[str, Any] = {}
    for field in FIELDS:
        name, raw = _given(field.name.upper(), variables)
        if raw:
            values[field.name] = _convert(name, raw, field)
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


FIELDS = [field for field in dataclasses.fields(Config) if field.metadata]
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


def type_of(field: dataclasses.Field[Any]) -> Any:
    """The type of a setting, with its bounds."""
    return Annotated[field.type, msgspec.Meta(**field.metadata["bounds"])]


def _convert(name: str, raw: str, field: dataclasses.Field[Any]) -> Any:
    kind = msgspec.inspect.type_info(type_of(field))
    shown = "…" if field.metadata["secret"] else repr(raw)
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
        return msgspec.convert(raw, type_of(field), strict=False)
    except msgspec.MsgspecError:
        words = field.metadata["allowed"] or allowed(kind)
        raise ConfigError(
            f"{name}={shown} is not allowed: it must be {words}. {field.metadata['description']}"
        ) from None


def _plain_host(host: str) -> str:
    """The address without the brackets that an IPv6 address has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _plain_device(device: str) -> str:
    return re.sub(r"\s", "", device.lower())


NORMALIZERS: dict[str, Callable[[str], str]] = {"HOST": _plain_host, "DEVICE": _plain_device}
