"""The cache returns what was stored, drops the least recently used entry, and knows its size."""

import gc
import random
import sys
import tracemalloc

import numpy as np

from embedding_service.inference.vector_cache import VectorCache, vectors_of


def vector(seed: int, dimension: int = 384) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(dimension).astype(np.float32)


def test_it_returns_what_was_stored():
    cache = VectorCache(1 << 20)
    row = np.stack([vector(1), vector(2)])
    cache.put(("model", None), "text", row[1], 7, True)
    row[:] = 0
    found = cache.get(("model", None), "text")
    assert np.array_equal(vectors_of([found])[0], vector(2))
    assert (found.tokens, found.truncated) == (7, True)


def test_every_part_of_the_context_counts():
    cache = VectorCache(1 << 20)
    contexts = [("m", None, None, None), ("n", None, None, None), ("m", "query: ", None, None)]
    contexts += [("m", None, "query", None), ("m", None, None, "left")]
    for seed, context in enumerate(contexts):
        cache.put(context, "text", vector(seed), seed, False)
    for seed, context in enumerate(contexts):
        assert np.array_equal(vectors_of([cache.get(context, "text")])[0], vector(seed))


def test_the_least_recently_used_goes_first():
    cache = VectorCache(40_000)
    for number in range(5):
        cache.put("c", str(number), vector(number), 1, False)
    number = 5
    while len(cache) == number:
        cache.get("c", "0")
        cache.put("c", str(number), vector(number), 1, False)
        number += 1
    assert cache.get("c", "0") is not None
    assert cache.get("c", "1") is None
    assert cache.get("c", str(number - 1)) is not None


def test_its_size_is_within_the_limit_and_what_python_measures():
    chance = random.Random(1)
    cache = VectorCache(100_000)
    for number in range(2000):
        cache.put("c", "é" * chance.randrange(400) + str(number % 700), vector(number, 32), number, False)
        assert cache.bytes <= 100_000
        if number % 100 == 0:
            entries = cache._entries
            content = sum(
                sum(map(sys.getsizeof, (key, key[1], entry, entry.vector, entry.tokens)))
                for key, entry in entries.items()
            )
            assert cache.bytes == content + sys.getsizeof(entries)
    assert len(cache) > 20


def test_its_size_is_that_of_the_memory_it_takes():
    gc.collect()
    tracemalloc.start()
    try:
        cache = VectorCache(4 << 20)
        before = tracemalloc.get_traced_memory()[0]
        number = 0
        while cache.bytes < 3 << 20:
            cache.put("c", f"text {number}", vector(1), 1, False)
            number += 1
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.9 < taken / cache.bytes < 1.1


def test_prompts_count_too():
    cache = VectorCache(1 << 20)
    for number in range(1000):
        cache.put(("fingerprint", f"{number} " * 2000, None, None), "text", vector(1), 1, False)
    assert 0 < len(cache) < (1 << 20) / 4000


def test_an_entry_larger_than_the_cache_is_not_kept():
    cache = VectorCache(1000)
    cache.put("c", "text", vector(1), 1, False)
    assert len(cache) == 0
