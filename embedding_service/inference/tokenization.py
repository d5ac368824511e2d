"""Tokenizes requests: small ones of a message together, large ones part by part. No threads, no locks."""

import logging
import time
from collections.abc import Sequence
from itertools import islice

from embedding_service.errors import DeadlineExceeded, InvalidRequest, ModelFailure, ServiceError
from embedding_service.inference.model import Model
from embedding_service.inference.pending import PendingRequest
from embedding_service.inference.tokenized import TokenizedTexts

log = logging.getLogger(__name__)

# A request of up to this many texts and characters is tokenized by the thread that brings it, together
# with others that it brings, which saves a thread switch. A larger one is tokenized by the tokenizer
# thread in parts, in turn, so that no request waits for the tokenization of another's 2,048 texts.
SMALL_TEXTS, SMALL_CHARACTERS = 64, 16_384

# The largest part. An accelerator is fed by the tokenizer's own threads, which need many texts to be fast.
PART_TEXTS, PART_CHARACTERS = 128, 131_072
PARTS_FOR_ACCELERATOR = 8

# From this many texts on, the tokenizer's own threads save more than they cost.
PARALLEL_TEXTS = 16


def is_large(pending: PendingRequest) -> bool:
    """Whether a request must not be tokenized by the thread that brings it."""
    return len(pending.distinct.texts) > SMALL_TEXTS or pending.characters > SMALL_CHARACTERS


def tokenize_together(
    model: Model, together: Sequence[PendingRequest]
) -> tuple[list[PendingRequest], list[tuple[PendingRequest, ServiceError]]]:
    """Tokenize whole requests of one context; returns those that are ready, and the errors of the others."""
    try:
        _tokenize_together(model, together)
        return list(together), []
    except BaseException as error:  # a panic of the Rust tokenizer is not an Exception
        if len(together) == 1:
            return [], [(together[0], failure(error, together[0]))]
    ready, failed = [], []
    for one in together:
        fine, bad = tokenize_together(model, [one])
        ready += fine
        failed += bad
    return ready, failed


def _tokenize_together(model: Model, together: Sequence[PendingRequest]) -> None:
    began = time.monotonic()
    for pending in together:
        _check_deadline(pending, began)
    texts = (
        together[0].distinct.texts
        if len(together) == 1
        else [text for pending in together for text in pending.distinct.texts]
    )
    tokenized = _prepare(model, together[0], texts, parallel=not model.on_cpu)
    lengths = iter(tokenized.lengths.tolist())
    any_cut = tokenized.truncated.any()
    first = 0
    for pending in together:
        count = len(pending.distinct.texts)
        pending.attach(tokenized, first, sum(islice(lengths, count)))
        if any_cut:
            _refuse_truncated(model, pending, tokenized, first, 0)
        first += count
    seconds = time.monotonic() - began
    for pending in together:
        pending.tokenization_seconds = seconds


def tokenize_part(model: Model, pending: PendingRequest, *, idle: bool) -> TokenizedTexts:
    """The next texts of a large request; `idle` if the model is. Raises a ServiceError."""
    try:
        began = time.monotonic()
        _check_deadline(pending, began)
        texts = _part(pending, 1 if model.on_cpu else PARTS_FOR_ACCELERATOR)
        tokenized = _prepare(model, pending, texts, parallel=idle or not model.on_cpu)
        if tokenized.truncated.any():
            _refuse_truncated(model, pending, tokenized, 0, pending.arrived)
        pending.tokenization_seconds += time.monotonic() - began
        return tokenized
    except BaseException as error:
        raise failure(error, pending) from None


def failure(error: BaseException, pending: PendingRequest) -> ServiceError:
    """What the caller hears of an error; one of the service's own names the text by its index."""
    if not isinstance(error, ServiceError):
        log.error("Tokenization failed", exc_info=error)
        return ModelFailure("the request could not be tokenized")
    return error


def _prepare(
    model: Model, pending: PendingRequest, texts: Sequence[str], *, parallel: bool
) -> TokenizedTexts:
    request = pending.request
    try:
        return model.preprocessor.prepare(
            texts,
            pending.prompt,
            request.input_type,
            request.truncation_side,
            parallel=parallel and len(texts) >= PARALLEL_TEXTS,
        )
    except InvalidRequest as error:
        if error.index is not None:
            error.index = pending.distinct.index_of(pending.arrived + error.index)
        raise


def _check_deadline(pending: PendingRequest, now: float) -> None:
    if now > pending.request.deadline:
        raise DeadlineExceeded("the deadline passed in the queue")


def _refuse_truncated(
    model: Model, pending: PendingRequest, tokenized: TokenizedTexts, first: int, before: int
) -> None:
    """Refuse texts of a request that were cut: rows from `first` on, which are its texts from `before` on."""
    count = len(pending.distinct.texts) - before
    cut = tokenized.truncated[first : first + count].nonzero()[0].tolist()
    indices = [pending.distinct.index_of(before + row) for row in cut]
    pending.refuse_truncated(indices, model.info.max_seq_length)


def _part(pending: PendingRequest, parts: int) -> list[str]:
    texts, first = pending.distinct.texts, pending.arrived
    last, characters = first, 0
    most = first + parts * PART_TEXTS
    while last < min(len(texts), most) and characters < parts * PART_CHARACTERS:
        characters += len(texts[last])
        last += 1
    return texts[first:last]
