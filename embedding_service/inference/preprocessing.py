"""From texts to the model's input by the Rust tokenizer, without torch."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol

import msgspec
import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.normalizers import BertNormalizer

from embedding_service.engine import Text
from embedding_service.errors import InvalidRequest
from embedding_service.inference.runtime import Side
from embedding_service.inference.tokenized import Batch, IntArray, TokenizedTexts

# Texts that reveal differences from the model's own tokenization: case, space, other scripts, emoji.
PROBES = [
    "Hello World",
    "  two  spaces\tand a tab \n",
    "",
    "ÀÉÎ straße Ünïcödé ﬁ İstanbul",
    "東京 한국어 مرحبا שלום 👩‍👩‍👧 \u200b\ufeff",
    "a" * 300,
    "one two three four five six seven eight nine ten " * 8,
]

# Handing texts to another thread costs about as much as tokenizing two of them.
TEXTS_WORTH_A_THREAD = 16

Features = dict[str, Any]
Encode = Callable[[Sequence[str]], list[Encoding]]


class Preprocessor(Protocol):
    """Reads texts for one model; `makes_arrays` if `pack` gives nothing but arrays and numbers."""

    makes_arrays: bool

    def prepare(
        self,
        texts: Sequence[Text],
        prompt: str | None = None,
        task: str | None = None,
        side: Side | None = None,
        *,
        parallel: bool = False,
    ) -> TokenizedTexts:
        """Tokenize texts, cut at `side`; `parallel` uses several cores.

        Raises InvalidRequest, with the index, for a text that is not Unicode or ids that it cannot read.
        """

    def plain(self) -> Tokenizer:
        """A tokenizer that neither truncates nor pads.

        Raises InvalidRequest if the model's cannot tell where a token is in the text.
        """

    def pack(self, batch: Batch) -> Features:
        """The input of a forward pass: int64 arrays of shape (rows, width), or what `preprocess` gives."""

    def for_copy(self, model: Any) -> "Preprocessor":
        """The preprocessor that packs what this one prepared for another copy of its SentenceTransformer."""


# The Rust tokenizer


class TokenizerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a RustTokenizer needs to know; `serialized` is the tokenizer as its library writes it."""

    serialized: str
    max_length: int
    truncation_side: Side
    pad_id: int
    pads_left: bool
    # The names of the model's inputs.
    inputs: list[str]
    # Whether pooling leaves the prompt out; its length is then counted without a special token at its end.
    prompt_left_out: bool
    special_ids: list[int]


@dataclass(slots=True, frozen=True, eq=False)
class Unpadded:
    """A batch that the device pads to its `width`, masks included; `ids` are parts, one after another."""

    lengths: IntArray
    ids: list[IntArray]
    width: int
    facts: TokenizerFacts
    prompt_length: int | None = None

    def write(self, room: IntArray, rows: int) -> int:
        """Write the lengths, in the room for those of `rows` texts, and the ids; returns how much is used.

        A row without a text gets one token, since none would divide by zero.
        """
        count = len(self.lengths)
        room[:count], room[count:rows] = self.lengths, 1
        end = rows + int(self.lengths.sum())
        np.concatenate(self.ids, out=room[rows:end])
        return end


class RustTokenizer:
    """Tokenizes with `encode_batch_fast`, which releases the GIL, and packs with numpy."""

    makes_arrays = True

    def __init__(self, facts: TokenizerFacts, threads: int = 1) -> None:
        """`threads` is how many a parallel `prepare` may use."""
        # Truncation and padding are state: the default model's tokenizer.json says truncation=128 and
        # padding=128, but the model reads 256 tokens.
        tokenizer = Tokenizer.from_str(facts.serialized)
        tokenizer.no_padding()
        tokenizer.enable_truncation(facts.max_length, direction=facts.truncation_side)
        self.facts = facts
        self._max_length = facts.max_length
        self._by_side: dict[Side | None, Tokenizer] = {None: tokenizer, facts.truncation_side: tokenizer}
        bert = isinstance(tokenizer.normalizer, BertNormalizer)
        self._english = English(tokenizer, facts) if bert else None
        self._pad_id = facts.pad_id
        self._pads_left = facts.pads_left
        self._with_type_ids = "token_type_ids" in facts.inputs
        self._prompt_left_out = facts.prompt_left_out
        self._special_ids = frozenset(facts.special_ids)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    def prepare(
        self,
        texts: Sequence[Text],
        prompt: str | None = None,
        task: str | None = None,
        side: Side | None = None,
        *,
        parallel: bool = False,
    ) -> TokenizedTexts:
        prompt_length = None
        if prompt:
            prompt_length = self._prompt_length(prompt) if self._prompt_left_out else None
        tokenizer = self._by_side.get(side) or self._cutting(side)
        try:
            whole = [prompt + text for text in texts] if prompt else texts  # type: ignore[operator]
            own = self._english if tokenizer is self._by_side[None] else None
            encode: Any = own.encode if own else tokenizer.encode_batch_fast
            encodings = self._in_threads(encode, whole) if parallel and self._threads > 1 else encode(whole)
        except TypeError:
            encodings = self._encode_with_ids(texts, prompt or "", tokenizer)
        lists = [encoding.ids for encoding in encodings]
        ends = list(accumulate(map(len, lists)))
        offsets = np.array([0, *ends], np.int32)
        lengths = offsets[1:] - offsets[:-1]
        ids = np.fromiter(chain.from_iterable(lists), np.int32, ends[-1])
        truncated = lengths >= self._max_length
        if max(map(len, lists)) >= self._max_length:
            for row in truncated.nonzero()[0].tolist():
                # A text may also be exactly as long as the limit.
                truncated[row] = bool(encodings[row].overflowing)
        return TokenizedTexts(lengths, truncated, prompt_length, ids, offsets[:-1])

    def _prompt_length(self, prompt: str) -> int:
        """The tokens that pooling leaves out, counted as the model's first module does."""
        ids = self._by_side[None].encode(prompt).ids
        return len(ids) - (bool(ids) and ids[-1] in self._special_ids)

    def plain(self) -> Tokenizer:
        """A copy of the tokenizer that neither truncates nor pads."""
        return without_limits(self._by_side[None])

    def _cutting(self, side: Side | None) -> Tokenizer:
        """A tokenizer that truncates at the other side than the model's own, made when first needed."""
        other = Tokenizer.from_str(self._by_side[None].to_str())
        other.enable_truncation(self._max_length, direction=side)
        self._by_side[side] = other
        return other

    def _encode_with_ids(self, texts: Sequence[Text], prompt: str, tokenizer: Tokenizer) -> list[Encoding]:
        """Tokenize texts, some of which are token ids or not Unicode. Raises InvalidRequest."""
        decoded = decode_ids(tokenizer, texts, skip_special_tokens=bool(prompt))
        encodings = []
        for index, text in enumerate(decoded):
            is_text = isinstance(texts[index], str)
            encodings += tokenizer.encode_batch_fast(
                [prompt + text], add_special_tokens=is_text or bool(prompt)
            )
            if not is_text and not encodings[-1].ids:
                raise InvalidRequest("holds token ids that stand for no text", index=index)
        return encodings

    def _in_threads(self, encode: Encode, texts: Sequence[Any]) -> list[Encoding]:
        shares = max(1, min(self._threads, len(texts) // TEXTS_WORTH_A_THREAD))
        bounds = [len(texts) * share // shares for share in range(shares + 1)]
        pieces = [texts[first:last] for first, last in pairwise(bounds)]
        return list(chain.from_iterable(self._pool.map(encode, pieces)))

    def pack(self, batch: Batch) -> Features:
        found = [part.tokenized.ids_of(part.rows) for part in batch]
        lengths = batch[0].lengths if len(batch) == 1 else np.concatenate([part.lengths for part in batch])
        width = max(lengths.tolist())
        if len(lengths) * width == sum(map(len, found)):
            mask = np.ones((len(lengths), width), np.int64)
            ids = (
                (found[0] if len(found) == 1 else np.concatenate(found)).astype(np.int64).reshape(mask.shape)
            )
        else:
            columns = np.arange(width)
            real = columns >= (width - lengths)[:, None] if self._pads_left else columns < lengths[:, None]
            ids = np.full(real.shape, self._pad_id, np.int64)
            ids[real] = np.concatenate(found)
            mask = real.astype(np.int64)
        packed: Features = {"input_ids": ids, "attention_mask": mask}
        if self._with_type_ids:
            packed["token_type_ids"] = np.zeros(ids.shape, np.int64)
        prompt_length = batch[0].tokenized.group
        if prompt_length is not None:
            packed["prompt_length"] = prompt_length
        return packed

    def pack_unpadded(self, batch: Batch) -> Unpadded:
        """What `pack` gives, before anything is padded."""
        lengths = batch[0].lengths if len(batch) == 1 else np.concatenate([part.lengths for part in batch])
        ids = [part.tokenized.ids_of(part.rows) for part in batch]
        prompt_length: Any = batch[0].tokenized.group
        return Unpadded(lengths, ids, int(lengths.max()), self.facts, prompt_length)

    def for_copy(self, model: Any) -> "RustTokenizer":
        return self


class English:
    """A tokenizer with BERT's normaliser, which is left out for texts that it would at most lowercase.

    It takes a third of the time, and changes nothing else in printable ASCII. Tokens that are added to the
    vocabulary are found before it or behind it, so texts that may contain one are not spared it.
    """

    def __init__(self, tokenizer: Tokenizer, facts: TokenizerFacts) -> None:
        self._tokenizer = tokenizer
        # With the same model, and so the same vocabulary in memory.
        self._bare = Tokenizer(tokenizer.model)
        self._bare.pre_tokenizer = tokenizer.pre_tokenizer
        self._bare.post_processor = tokenizer.post_processor
        self._bare.enable_truncation(facts.max_length, direction=facts.truncation_side)
        normalizer = tokenizer.normalizer
        self._case = str.lower if normalizer.lowercase else str
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        forms = {normalizer.normalize_str(text).lower() for text in added}
        self._added = re.compile("|".join(map(re.escape, forms)) or "(?!)")

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """As `encode_batch_fast` of the tokenizer."""
        bare, whole = self._bare.encode_batch_fast, self._tokenizer.encode_batch_fast
        if self._is_plain(" ".join(texts)):
            return bare(list(map(self._case, texts)))
        plain = [self._is_plain(text) for text in texts]
        found = {
            True: iter(bare([self._case(text) for text, so in zip(texts, plain, strict=True) if so])),
            False: iter(whole([text for text, so in zip(texts, plain, strict=True) if not so])),
        }
        return [next(found[so]) for so in plain]

    def _is_plain(self, text: str) -> bool:
        return text.isascii() and text.isprintable() and not self._added.search(text.lower())


def decode_ids(tokenizer: Tokenizer, texts: Sequence[Text], *, skip_special_tokens: bool) -> list[str]:
    """The texts, those that are token ids decoded. Raises InvalidRequest."""
    decoded = []
    for index, text in enumerate(texts):
        if isinstance(text, str):
            decoded.append(text)
        else:
            for each in text:
                if tokenizer.id_to_token(each) is None:
                    reason = f"holds the token id {each}, which is not in the model's vocabulary"
                    raise InvalidRequest(reason, index=index)
            decoded.append(tokenizer.decode(text, skip_special_tokens=skip_special_tokens))
    check_unicode(decoded)
    return decoded


def check_unicode(texts: Sequence[str]) -> None:
    """Raises InvalidRequest for the first text that is not Unicode."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("is not valid Unicode: it has a lone surrogate", index=index) from None


def without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer that neither truncates nor pads."""
    copy: Tokenizer = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
