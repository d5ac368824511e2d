"""An in-memory cache of vectors that evicts the least recently used first. Not thread-safe."""

import sys
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from embedding_service.engine import Text, Vectors

Key = tuple[Hashable, Text]


class Cached(NamedTuple):
    """A text's vector as the model returned it, its tokens, and whether it was truncated."""

    vector: bytes
    tokens: int
    truncated: bool


class VectorCache:
    """Vectors by text and `context`, which is everything else that affects a vector.

    They are kept before the service cuts or normalises them, so requests with other options share them.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[Key, Cached] = OrderedDict()
        self._content_bytes = 0

    @property
    def bytes(self) -> int:
        """Memory used by the entries and the table."""
        return self._content_bytes + sys.getsizeof(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, context: Hashable, text: Text) -> Cached | None:
        """Look up a text and mark it most recently used."""
        key = (context, text)
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, context: Hashable, text: Text, vector: Vectors, tokens: int, truncated: bool) -> None:
        """Store a copy of the vector, and evict old entries until everything fits."""
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
    """Bytes freed with the entry. Each request brings a context of its own, and with it its prompt."""
    context, text = key
    own = (
        (context, *(part for part in context if isinstance(part, str))) if isinstance(context, tuple) else ()
    )
    return sum(map(sys.getsizeof, (key, text, entry, entry.vector, entry.tokens, *own)))
