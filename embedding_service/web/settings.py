"""The settings of the web half."""

from typing import Literal

import msgspec


class WebSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the web half; config.py describes them."""

    max_texts_per_request: int = 4096
    max_text_characters: int = 100_000
    max_body_bytes: int = 32 << 20
    request_timeout_seconds: float = 60.0
    max_concurrent_requests: int = 512
    default_overflow: Literal["truncate", "error", "mean"] = "truncate"
    served_model_name: str | None = None
    aip_health_route: str = ""
    aip_predict_route: str = ""
    cors_origins: str = ""
    access_log: bool = False
    traces: bool = False
    slow_request_seconds: float = 0.0
    api_keys: str | None = None
    api_keys_file: str | None = None
