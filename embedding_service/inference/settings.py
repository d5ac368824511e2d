"""What the model's half needs to load and run one model on one device."""

import msgspec


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one model process; the fields mean what they mean in config.py."""

    embedding_model: str
    model_revision: str | None = None
    device: str = "auto"
    cpu_fallback: bool = True
    dtype: str = "auto"
    backend: str = "auto"
    cache_folder: str | None = None
    attn_implementation: str | None = None
    batch_size: int = 32
    max_seq_length: int = 256
    max_queued_tokens: int = 2_000_000
    cache_mb: int = 0
    int8_ranges: str | None = None
    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None
    # Model processes of this service, which share the cores among them.
    model_processes: int = 1
    # Those on the same device, which share its memory.
    device_processes: int = 1
