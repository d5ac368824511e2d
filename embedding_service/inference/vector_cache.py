"""An optional cache of vectors in memory, least recently used out first. It has no lock."""

import sys
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from embedding_service.engine import Vectors

Key = tuple[Hashable, str]


class Cached(NamedTuple):
    """A text's vector as the model gave it, and what a request is told of the text."""

    vector: bytes
    tokens: int
    truncated: bool


class VectorCache:
    """Vectors by all that changes them; `context` is that but for the text, and `text` the rest.

    What is kept is neither cut nor normalised by the service, so that requests share it whatever they ask.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[Key, Cached] = OrderedDict()
        self._content_bytes = 0

    @property
    def bytes(self) -> int:
        """What the entries take, and the table that holds them."""
        return self._content_bytes + sys.getsizeof(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, context: Hashable, text: str) -> Cached | None:
        """The entry for a text, which is then the last to go."""
        key = (context, text)
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, context: Hashable, text: str, vector: Vectors, tokens: int, truncated: bool) -> None:
        """Keep a copy of the vector, and let the oldest go until all fits."""
        key = (context, text)
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        entry = Cached(vector.tobytes(), tokens, truncated)
        size = _size(key, entry)
        if size > self._limit_bytes:
            return
        self._entries[key] = entry
        self._content_bytes += size
        while self._entries and self.bytes > self._limit_bytes:
            self._content_bytes -= _size(*self._entries.popitem(last=False))


def vectors_of(entries: list[Cached]) -> Vectors:
    """The vectors of the entries, one a row."""
    return np.stack([np.frombuffer(entry.vector, np.float32) for entry in entries])


def _size(key: Key, entry: Cached) -> int:
    """The bytes that go with the entry; its context is shared by many."""
    parts = (key, key[1], entry, entry.vector, entry.tokens)
    return sum(map(sys.getsizeof, parts))
