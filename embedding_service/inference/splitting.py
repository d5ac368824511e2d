"""Cuts texts that are longer than the model reads into pieces that it can read whole."""

from collections.abc import Sequence
from typing import cast

from tokenizers import Tokenizer

from embedding_service.engine import Chunk, Text
from embedding_service.errors import InvalidRequest
from embedding_service.inference.preprocessing import check_unicode


class Splitter:
    """Cuts between words if a word ends in the second half of the piece, and otherwise between tokens.

    So the tokens of a piece are those of its characters alone, and so is its vector.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int | None) -> None:
        """`tokenizer` neither truncates nor pads.

        `max_length` counts tokens, with prompt and special tokens; None if the model reads everything.
        """
        self._tokenizer = tokenizer
        self._max_length = max_length

    def split(self, sent: Sequence[Text], prompt: str | None, overlap: int) -> list[list[Chunk]]:
        """The pieces of each text; an empty text is one piece. Raises InvalidRequest."""
        for index, text in enumerate(sent):
            if not isinstance(text, str):
                raise InvalidRequest("is token ids, which cannot be cut into pieces", index=index)
        texts = cast(Sequence[str], sent)
        check_unicode(texts)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        if self._max_length is None:
            return [
                [Chunk(0, len(text), len(encoding.ids))]
                for text, encoding in zip(texts, encodings, strict=True)
            ]
        room = self._max_length - self._count(prompt or "")
        if room < 1:
            raise InvalidRequest(
                f"the prompt leaves no room for a text in the {self._max_length} tokens that the model reads"
            )
        if overlap >= room:
            raise InvalidRequest(f"must be below {room}, the tokens of a piece", field="chunk_overlap")
        return [
            self._pieces(text, encoding.offsets, prompt or "", room, overlap)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _pieces(
        self, text: str, offsets: list[tuple[int, int]], prompt: str, room: int, overlap: int
    ) -> list[Chunk]:
        if len(offsets) <= room and self._fits(prompt + text):
            return [Chunk(0, len(text), len(offsets))]
        chunks: list[Chunk] = []
        first = last = 0
        while last < len(offsets):
            last = end_of_piece(offsets, first, room, last)
            # A piece that ends inside a word may be more tokens than it was as a part of the text.
            while last > first + 1 and not self._fits(
                prompt + text[offsets[first][0] : offsets[last - 1][1]]
            ):
                last -= max(1, (last - first) // 16)
            chunks.append(Chunk(offsets[first][0], offsets[last - 1][1], last - first))
            first = start_of_next(offsets, first, last, overlap)
        return chunks

    def _fits(self, text: str) -> bool:
        return self._max_length is None or self._count(text) <= self._max_length

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)


def end_of_piece(offsets: Sequence[tuple[int, int]], first: int, room: int, after: int) -> int:
    """The index after the last token of a piece of at most `room` tokens, before a word if possible.

    It is past `after`, where the piece before ended.
    """
    last = min(first + room, len(offsets))
    if last == len(offsets):
        return last
    for index in range(last, max(first + room // 2, after), -1):
        if _starts_word(offsets, index):
            return index
    return last


def start_of_next(offsets: Sequence[tuple[int, int]], first: int, last: int, overlap: int) -> int:
    """The first token of the piece after the one from `first` to before `last`: a word's, if possible."""
    earliest = max(last - overlap, first + 1)
    for index in range(earliest, last + 1):
        if _starts_word(offsets, index):
            return index
    return earliest


def _starts_word(offsets: Sequence[tuple[int, int]], index: int) -> bool:
    """Whether white space separates this token from the one before it."""
    return index == len(offsets) or offsets[index - 1][1] < offsets[index][0]
