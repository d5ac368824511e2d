"""Reads texts: cuts long ones into pieces, and tokenizes small requests together, large ones in parts.

No threads, no locks.
"""

import logging
import time
from collections.abc import Sequence

from embedding_service.engine import Text
from embedding_service.errors import DeadlineExceeded, InvalidRequest, ModelFailure, ServiceError, TooLarge
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


def tokenize_together(
    model: Model, together: Sequence[PendingRequest]
) -> tuple[Sequence[PendingRequest], list[tuple[PendingRequest, ServiceError]]]:
    """Tokenize whole requests of one context; returns those that are ready, and the errors of the others."""
    lead = together[0]
    try:
        began = _begin(together)
        texts = (
            lead.distinct.texts
            if len(together) == 1
            else [text for pending in together for text in pending.distinct.texts]
        )
        tokenized = _tokenize(model, lead, texts, parallel=not model.on_cpu, alone=len(together) == 1)
        lengths = tokenized.lengths.tolist()
        # What is truncated has as many tokens as the model reads.
        truncated = tokenized.truncated.tolist() if max(lengths) >= model.info.max_seq_length else []
        seconds = time.monotonic() - began
        first = 0
        for pending in together:
            last = first + len(pending.distinct.texts)
            pending.attach(tokenized, first, sum(lengths[first:last]))
            pending.tokenization_seconds += seconds
            if truncated:
                pending.refuse_truncated(truncated[first:last], 0, model.info.max_seq_length)
            first = last
        return together, []
    except BaseException as error:  # a panic of the Rust tokenizer is not an Exception
        if len(together) == 1:
            return [], [(lead, failure(error))]
    each = [tokenize_together(model, [pending]) for pending in together]
    return [one for ready, _ in each for one in ready], [one for _, failed in each for one in failed]


def tokenize_part(model: Model, pending: PendingRequest, *, idle: bool) -> TokenizedTexts:
    """The next texts of a large request; `idle` if the model is. Raises a ServiceError."""
    try:
        began = _begin([pending])
        parts = 1 if model.on_cpu else PARTS_FOR_ACCELERATOR
        texts = _part(pending.distinct.texts, pending.arrived, parts * PART_TEXTS, parts * PART_CHARACTERS)
        tokenized = _tokenize(model, pending, texts, parallel=idle or not model.on_cpu)
        pending.tokenization_seconds += time.monotonic() - began
        return tokenized
    except BaseException as error:
        raise failure(error) from None


def cut_next(model: Model, pending: PendingRequest) -> list[Text] | None:
    """Cut the next texts of a request; all of its pieces with the last, else None. Raises a ServiceError."""
    try:
        began = _begin([pending])
        chunks = pending.chunks
        assert chunks is not None
        first = len(chunks)
        last = first + len(_part(pending.texts, first, SMALL_TEXTS, SMALL_CHARACTERS))
        while len(chunks) < last:
            try:
                texts = pending.texts[first:last]
                chunks += model.splitter.split(texts, pending.prompt, pending.request.overlap)
            except InvalidRequest as error:
                if error.index is None:
                    raise
                pending.refuse(first + error.index, error)
        pending.tokenization_seconds += time.monotonic() - began
        if len(chunks) < len(pending.texts):
            return None
    except BaseException as error:
        raise failure(error, "the request could not be split into pieces") from None
    most, count = pending.request.max_chunks, sum(map(len, chunks))
    if most is not None and count > most:
        raise TooLarge(
            f"make {count} pieces of the length that the model reads; at most {most} are allowed",
            field="texts",
        )
    return [
        text[chunk.start : chunk.stop]
        for text, own in zip(pending.texts, chunks, strict=True)
        for chunk in own
    ]


def _begin(together: Sequence[PendingRequest]) -> float:
    """The time. Raises DeadlineExceeded if a request's deadline has passed."""
    now = time.monotonic()
    if now > min([pending.request.deadline for pending in together]):
        raise DeadlineExceeded("the deadline passed in the queue")
    return now


def failure(error: BaseException, reason: str = "the request could not be tokenized") -> ServiceError:
    """What the caller hears of an error; one of the service's own names the text by its index."""
    if not isinstance(error, ServiceError):
        log.error("Tokenization failed", exc_info=error)
        return ModelFailure(reason)
    return error


def _tokenize(
    model: Model, pending: PendingRequest, texts: list[Text], *, parallel: bool, alone: bool = True
) -> TokenizedTexts:
    """Tokenize texts of a request that have not arrived yet, or if it is not `alone` of several like it."""
    request, first = pending.request, pending.arrived
    while True:
        try:
            return model.preprocessor.prepare(
                texts,
                pending.prompt,
                request.input_type,
                request.truncation_side,
                parallel=parallel and len(texts) >= PARALLEL_TEXTS,
            )
        except InvalidRequest as error:
            index = error.index
            if index is None or not alone:
                raise
            pending.refuse_row(first + index, error)
            pending.distinct.texts[first + index] = ""
            texts = [*texts[:index], "", *texts[index + 1 :]]


def _part(texts: list[Text], first: int, most_texts: int, most_characters: int) -> list[Text]:
    """The texts from `first` on, within both limits, but at least one."""
    last, characters = first, 0
    while last < min(len(texts), first + most_texts) and characters < most_characters:
        characters += len(texts[last])
        last += 1
    return texts[first:last]
