"""Which texts of a request must be computed: each distinct one that the cache does not know."""

from collections.abc import Hashable

import msgspec
import numpy as np

from embedding_service.engine import Text
from embedding_service.inference.tokenized import IntArray
from embedding_service.inference.vector_cache import Cached, VectorCache


class Distinct(msgspec.Struct, eq=False, frozen=True):
    """The distinct texts of a request, and for each of its texts which one it is, as np.unique returns them.

    `inverse` counts the `texts` to compute first and the `cached` ones after them; it is None if each text
    of the request is to be computed.
    """

    texts: list[Text]
    cached: list[Cached] = []
    inverse: IntArray | None = None

    def indices_of(self, row: int) -> list[int]:
        """The indices in the request of a text, computed or cached."""
        return [row] if self.inverse is None else np.flatnonzero(self.inverse == row).tolist()

    @property
    def hits(self) -> int:
        """How many texts of the request the cache answered."""
        return 0 if self.inverse is None else int(np.count_nonzero(self.inverse >= len(self.texts)))


def distinct(texts: list[Text], context: Hashable, cache: VectorCache | None) -> Distinct:
    """The texts without those that are repeated or cached."""
    if cache is None and len(set(texts)) == len(texts):
        return Distinct(texts)
    new: dict[Text, int] = {}
    known: dict[Text, tuple[int, Cached]] = {}
    for text in texts:
        if text not in new and text not in known:
            entry = cache.get(context, text) if cache is not None else None
            if entry is None:
                new[text] = len(new)
            else:
                known[text] = (len(known), entry)
    if len(new) == len(texts):
        return Distinct(texts)
    inverse = [new[text] if text in new else len(new) + known[text][0] for text in texts]
    return Distinct(list(new), [entry for _, entry in known.values()], np.array(inverse, np.int32))
