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


class InvalidRequest(ServiceError):
    """The request is invalid."""

    status = 400
    error_type = "validation"


class TextTooLong(ServiceError):
    """A text has more tokens than the model reads, and may not be truncated."""

    status = 400
    error_type = "validation"


class Unauthorized(ServiceError):
    """No key, or an unknown one."""

    status = 401
    error_type = "unauthorized"


class NotFound(ServiceError):
    """The resource does not exist."""

    status = 404
    error_type = "not_found"


class SlowUpload(ServiceError):
    """The body arrives too slowly."""

    status = 408
    error_type = "timeout"


class FingerprintMismatch(ServiceError):
    """The caller expects vectors of another model."""

    status = 412
    error_type = "fingerprint_mismatch"


class TooLarge(ServiceError):
    """The body, the number of texts or a single text exceeds a limit."""

    status = 413
    error_type = "too_large"


class UnsupportedMediaType(ServiceError):
    """The body is a form, or compressed in an unsupported way."""

    status = 415
    error_type = "unsupported_media_type"


class Overloaded(ServiceError):
    """The queue is full."""

    status = 429
    error_type = "overloaded"


class ModelFailure(ServiceError):
    """The model failed on this text, and only on it."""

    status = 500
    error_type = "internal"


class Unavailable(ServiceError):
    """No model is available now."""

    status = 503
    error_type = "unavailable"


class DeadlineExceeded(ServiceError):
    """The request waited longer than REQUEST_TIMEOUT_SECONDS."""

    status = 504
    error_type = "timeout"


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
