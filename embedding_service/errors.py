"""The service's errors and their statuses; any other exception is a 500.

ServiceError
├── InvalidRequest         400  the caller can fix it
├── TextTooLong            400  and may not be truncated
├── Unauthorized           401
├── NotFound               404
├── SlowUpload             408
├── FingerprintMismatch    412  another model than the caller expects
├── TooLarge               413
├── UnsupportedMediaType   415
├── Overloaded             429  the queue is full; carries how long to wait
├── ModelFailure           500  the model could not embed this text
├── Unavailable            503  loading, draining or lost; carries how long to wait
└── DeadlineExceeded       504

StartupError is the other root: the service cannot start, and its one-line message says why.
"""


class ServiceError(Exception):
    """An error with an HTTP status and the `error_type` of the native protocol.

    `index` and `field` locate the bad text or field in the engine's request, and `reason` completes a
    sentence that begins with them. Each protocol replaces them with its own names.
    """

    status = 500
    error_type = "internal"

    def __init_subclass__(cls, status: int = 500, error_type: str = "internal") -> None:
        cls.status, cls.error_type = status, error_type

    def __init__(
        self,
        reason: str,
        *,
        index: int | None = None,
        field: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.index = index
        self.field = field
        self.retry_after_seconds = retry_after_seconds

    @property
    def message(self) -> str:
        """The error as a sentence, with the engine's names."""
        return sentence(self.reason, self.index, self.field)

    def __str__(self) -> str:
        return self.message


class InvalidRequest(ServiceError, status=400, error_type="validation"):
    """The request is invalid."""


class TextTooLong(ServiceError, status=400, error_type="validation"):
    """A text has more tokens than the model reads, and may not be truncated."""


class Unauthorized(ServiceError, status=401, error_type="unauthorized"):
    """No key, or an unknown one."""


class NotFound(ServiceError, status=404, error_type="not_found"):
    """The resource does not exist."""


class SlowUpload(ServiceError, status=408, error_type="timeout"):
    """The body arrives too slowly."""


class FingerprintMismatch(ServiceError, status=412, error_type="fingerprint_mismatch"):
    """The caller expects vectors of another model."""


class TooLarge(ServiceError, status=413, error_type="too_large"):
    """The body, the number of texts or a single text exceeds a limit."""


class UnsupportedMediaType(ServiceError, status=415, error_type="unsupported_media_type"):
    """The body is a form, or compressed in an unsupported way."""


class Overloaded(ServiceError, status=429, error_type="overloaded"):
    """The queue is full."""


class ModelFailure(ServiceError):
    """The model failed on this text, and only on it."""


class Unavailable(ServiceError, status=503, error_type="unavailable"):
    """No model is available now."""


class DeadlineExceeded(ServiceError, status=504, error_type="timeout"):
    """The request waited longer than REQUEST_TIMEOUT_SECONDS."""


class StartupError(Exception):
    """The service cannot start; the message is one line with the reason and the remedy."""


class ConfigError(StartupError):
    """A setting has an invalid value; the message names both."""


def sentence(reason: str, index: int | None, field: str | None) -> str:
    """The reason after its subject: `texts[3] has more than 256 tokens`."""
    if index is not None:
        return f"{field or 'texts'}[{index}] {reason}"
    return f"{field} {reason}" if field is not None else reason


BY_NAME: dict[str, type[ServiceError]] = {kind.__name__: kind for kind in ServiceError.__subclasses__()}
