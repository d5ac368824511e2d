"""Texts as the model reads them: one set of arrays for all texts that were tokenized together."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

NO_ROWS: IntArray = np.empty(0, np.int32)
# The rows of small requests are slices of it.
FIRST_ROWS: IntArray = np.arange(4096, dtype=np.int32)
NO_FLAGS: BoolArray = np.empty(0, np.bool_)


@dataclass(slots=True, eq=False)
class TokenizedTexts:
    """Texts in their order, one a row. Only rows of equal `group` may share a batch.

    `lengths` counts the tokens of each text after truncation, special tokens included. The token ids of
    text i are `ids[offsets[i]:offsets[i] + lengths[i]]`, unless the model tokenizes `texts` for itself.
    """

    lengths: IntArray
    truncated: BoolArray
    group: Hashable
    ids: IntArray = field(default_factory=lambda: NO_ROWS)
    offsets: IntArray = field(default_factory=lambda: NO_ROWS)
    texts: list[str] = field(default_factory=list)

    def ids_of(self, rows: IntArray) -> IntArray:
        """The token ids of these rows, one after another."""
        lengths = self.lengths
        if len(rows) == 1:
            (row,) = rows.tolist()
            first = self.offsets[row]
            return self.ids[first : first + lengths[row]]
        lengths = lengths[rows]
        if (rows[1:] - rows[:-1] == 1).all():
            first = self.offsets[rows[0]]
            return self.ids[first : self.offsets[rows[-1]] + lengths[-1]]
        ends = lengths.cumsum()
        positions = np.arange(ends[-1]) + (self.offsets[rows] - ends + lengths).repeat(lengths)
        ids: IntArray = self.ids[positions]
        return ids

    def extend(self, more: "TokenizedTexts") -> None:
        """Append texts. Batches may read the rows that are here already, which stay the same."""
        used = int(self.offsets[-1] + self.lengths[-1]) if len(self.offsets) else 0
        if used + len(more.ids) > len(self.ids):
            # Twice as many, so that a request in many parts is not copied for each of them.
            self.ids = np.concatenate((self.ids[:used], np.empty(used + 2 * len(more.ids), np.int32)))
        self.ids[used : used + len(more.ids)] = more.ids
        self.offsets = np.concatenate((self.offsets, more.offsets + used))
        self.texts += more.texts
        self.truncated = np.concatenate((self.truncated, more.truncated))
        self.lengths = np.concatenate((self.lengths, more.lengths))


@dataclass(slots=True, eq=False)
class Rows:
    """Rows of tokenized texts, as part of a batch."""

    tokenized: TokenizedTexts
    rows: IntArray

    @classmethod
    def all_of(cls, tokenized: TokenizedTexts) -> "Rows":
        """Every row."""
        return cls(tokenized, np.arange(len(tokenized.lengths), dtype=np.int32))

    @property
    def lengths(self) -> IntArray:
        """The tokens of each row."""
        lengths: IntArray = self.tokenized.lengths[self.rows]
        return lengths


# The rows of a batch are all of one group.
Batch = Sequence[Rows]
