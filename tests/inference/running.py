"""Loads a model like the service and runs requests on it in mixed batches, without a queue."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from embedding_service.engine import EmbedRequest, Vectors
from embedding_service.inference.loading import load as load_runtime
from embedding_service.inference.model import Model
from embedding_service.inference.tokenized import Batch, Rows, TokenizedTexts
from embedding_service.settings.config import Config
from tests.inference import tiny_models

TEXTS_IN_A_BATCH = 9


@dataclass
class Answer:
    """The result of a request."""

    vectors: Vectors
    tokens: int
    truncated: list[int]


def load(folder, **settings) -> Model:
    """With one thread, since tiny models are no faster with more."""
    given = {"embedding_model": str(folder), "device": "cpu", "model_processes": 64, "cache_folder": ""}
    return load_runtime(Config(**given | settings))


def request(texts: Sequence[str], **fields) -> EmbedRequest:
    """A request without a deadline."""
    return EmbedRequest(texts=list(texts), deadline=float("inf"), **fields)


def texts(source: random.Random, count: int) -> list[str]:
    """Texts from empty to far too long for the model, with words that it does not know."""
    words = [*tiny_models.WORDS, "unbelievable", "東京", "x1!", "👩‍👩‍👧"]
    made = [" ".join(source.choices(words, k=int(source.lognormvariate(1.5, 1.0)))) for _ in range(count)]
    return ["", *made]


def embed(model: Model, requests: list[EmbedRequest]) -> list[Answer]:
    """The answers to requests whose texts share batches, on every stream in turn."""
    prepared = [prepare(model, one) for one in requests]
    vectors = [np.empty((len(one.texts), model.info.embedding_dimension), np.float32) for one in requests]
    streams = itertools.cycle([*model.streams, *([model.all_cores] if model.all_cores else [])])
    for numbers, batch in _mixed(prepared):
        rows = iter(next(streams).forward(batch))
        for number, part in zip(numbers, batch, strict=True):
            for row in part.rows:
                vectors[number][row] = next(rows)
    return [
        Answer(
            unit(own) if one.normalize else own,
            int(texts.lengths.sum()),
            np.flatnonzero(texts.truncated).tolist(),
        )
        for one, own, texts in zip(requests, vectors, prepared, strict=True)
    ]


def prepare(model: Model, one: EmbedRequest) -> TokenizedTexts:
    """Like the batcher."""
    return model.preprocessor.prepare(one.texts, model.prompt(one), one.input_type, one.truncation_side)


def alone(model: Model, text: str, prompt: str | None = None, task: str | None = None) -> Rows:
    """One text, prepared."""
    return Rows.all_of(model.preprocessor.prepare([text], prompt, task))


def unit(vectors: Vectors) -> Vectors:
    """Rows of length 1; a zero row stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _mixed(prepared: list[TokenizedTexts]) -> Iterator[tuple[list[int], Batch]]:
    """Batches with texts of several requests, and the number of the request of each slice."""
    places = [(number, row) for number, one in enumerate(prepared) for row in range(len(one.lengths))]
    random.Random(0).shuffle(places)
    places.sort(key=lambda place: repr(prepared[place[0]].group))
    for _, group in itertools.groupby(places, key=lambda place: prepared[place[0]].group):
        members = list(group)
        for first in range(0, len(members), TEXTS_IN_A_BATCH):
            by_request: dict[int, list[int]] = {}
            for number, row in members[first : first + TEXTS_IN_A_BATCH]:
                by_request.setdefault(number, []).append(row)
            slices = [Rows(prepared[n], np.array(rows, np.int32)) for n, rows in by_request.items()]
            yield list(by_request), slices
