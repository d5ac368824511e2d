"""What a request repeats or the cache knows is not computed, and every answer is right all the same."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedding_service.engine import Embeddings
from embedding_service.errors import TextTooLong
from embedding_service.inference.pending import normalize
from embedding_service.inference.runtime import OutOfMemory
from embedding_service.observability import metrics
from tests.inference.fake_runtime import Answer, FakeRuntime, request, submit, text, vector_of
from tests.service import wait_until


def computed(runtime: FakeRuntime) -> Counter:
    return Counter(one.text for batch in runtime.batches for one in batch)


def expect(outcome, texts, *, tokens: int, truncated=(), task=None, side=None, raw=False, cut=None) -> None:
    assert isinstance(outcome, Embeddings), outcome
    expected = np.stack([vector_of(one, task, side) for one in texts])[:, :cut]
    assert np.allclose(outcome.vectors, expected if raw else normalize(expected), atol=1e-6)
    assert (outcome.tokens, outcome.truncated) == (tokens, list(truncated))


def test_a_text_that_a_request_repeats_is_computed_once(build):
    runtime = FakeRuntime(max_seq_length=20)
    texts = [text(5), text(30), text(5), text(7), text(30)]
    expect(submit(build(runtime), texts).wait(), texts, tokens=5 + 20 + 5 + 7 + 20, truncated=[1, 4])
    assert computed(runtime) == {text(5): 1, text(30): 1, text(7): 1}


def test_only_equal_prompt_task_and_side_make_texts_identical(build):
    runtime = FakeRuntime()
    batcher = build(runtime, cache_bytes=1 << 20)
    for kind in ({}, {"input_type": "query"}, {"input_type": "document"}, {"truncation_side": "left"}):
        answer = submit(batcher, [text(5)], **kind)
        task, side = kind.get("input_type"), kind.get("truncation_side")
        expect(answer.wait(), [text(5)], tokens=5, task=task, side=side)


def test_a_poisoned_text_is_named_by_its_first_index(build):
    def poison(batch) -> None:
        if any("poison" in one.text for one in batch):
            raise RuntimeError("injected")

    batcher = build(FakeRuntime(on_forward=poison))
    bad = text(5, "poison")
    assert submit(batcher, [text(6), text(6), bad, bad]).wait().index == 2


# The cache


def test_the_cache_returns_what_was_computed_before(build):
    runtime = FakeRuntime(max_seq_length=20)
    batcher = build(runtime, cache_bytes=1 << 20)
    hits, misses = metrics.CACHE_HITS._value.get(), metrics.CACHE_MISSES._value.get()
    texts = [text(5), text(30)]
    first = submit(batcher, texts).wait()
    expect(first, texts, tokens=25, truncated=[1])
    assert first.cache_hits == 0
    mixed = [text(30), text(7), text(5), text(7)]
    second = submit(batcher, mixed, normalize=False).wait()
    expect(second, mixed, tokens=20 + 7 + 5 + 7, truncated=[0], raw=True)
    assert second.cache_hits == 2
    third = submit(batcher, [text(5)], dimensions=3).wait()
    expect(third, [text(5)], tokens=5, cut=3)
    assert third.cache_hits == 1
    assert computed(runtime) == {text(5): 1, text(30): 1, text(7): 1}
    assert metrics.CACHE_HITS._value.get() - hits == 3
    assert metrics.CACHE_MISSES._value.get() - misses == 4
    assert batcher.queued_tokens == 0


def test_a_cached_text_that_was_truncated_is_rejected_if_truncation_is_off(build):
    batcher = build(FakeRuntime(max_seq_length=20), cache_bytes=1 << 20)
    submit(batcher, [text(5), text(30)]).wait()
    refused = submit(batcher, [text(5), text(30)], overflow="error").wait()
    assert (type(refused), refused.index) == (TextTooLong, 1)


def test_without_a_cache_no_hits_are_reported(build):
    assert submit(build(FakeRuntime()), [text(5), text(5)]).wait().cache_hits is None


# Random requests


@pytest.mark.parametrize("cache_bytes", [0, 6_000, 1 << 20], ids=["no cache", "small cache", "cache"])
@pytest.mark.parametrize("seed", range(6))
def test_vectors_are_right_whatever_is_shared_and_whatever_fails(build, seed, cache_bytes):
    """Many requests share a few texts. Some fail, run out of memory, miss their deadline or are cancelled."""
    chance, lock = random.Random(seed), threading.Lock()

    def fail(batch) -> np.ndarray | None:
        with lock:
            throw = chance.random()
        if throw < 0.05:
            raise OutOfMemory("injected")
        if throw < 0.10:
            raise RuntimeError("injected")
        if throw < 0.15:
            return np.full((len(batch), 8), np.nan, np.float32)
        return None

    runtime = FakeRuntime(
        on_forward=fail,
        streams=2,
        all_cores=True,
        seconds_per_token=1e-6,
        on_cpu=seed % 2 == 0,
        max_seq_length=40,
    )
    batcher = build(runtime, cache_bytes=cache_bytes)
    pool = [text(n % 50 + 3, n // 50) for n in range(120)]
    asked: list[tuple[Answer, list[str], dict]] = []

    def client(number: int) -> None:
        own = random.Random(seed * 100 + number)
        for _ in range(40):
            texts = own.choices(pool, k=own.choice([1, 1, 1, 3, 20, 150]))
            fields: dict = own.choice([{}, {}, {"input_type": "query"}, {"truncation_side": "left"}])
            fields = fields | own.choice([{}, {"normalize": False}, {"dimensions": 3}])
            answer = Answer()
            batcher.submit([(0, request(texts, own.choice([0.002, 30, 30]), **fields))], answer)
            if own.random() < 0.1:
                batcher.cancel(answer)
            else:
                asked.append((answer, texts, fields))
            if own.random() < 0.3:
                answer.within(0.02)

    with ThreadPoolExecutor(4) as clients:
        list(clients.map(client, range(4)))
    right = 0
    for answer, texts, fields in asked:
        outcome = answer.wait(60)
        assert len(answer.outcomes) == 1
        if isinstance(outcome, Embeddings):
            right += 1
            wanted = [int(one.split()[0]) for one in texts]
            expect(
                outcome,
                texts,
                tokens=sum(min(40, length) for length in wanted),
                truncated=[index for index, length in enumerate(wanted) if length > 40],
                task=fields.get("input_type"),
                side=fields.get("truncation_side"),
                raw=not fields.get("normalize", True),
                cut=fields.get("dimensions"),
            )
    assert right > len(asked) / 4
    wait_until(lambda: batcher.queued_tokens == 0, "an empty queue")
