"""From texts to the model's input: by the Rust tokenizer if it equals the model's own `preprocess`."""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from tokenizers import Encoding, Tokenizer

from embedding_service.errors import InvalidRequest
from embedding_service.inference.checkpoint import find_pooling, length_limit
from embedding_service.inference.runtime import Side
from embedding_service.inference.tokenized import Batch, Rows, TokenizedTexts

log = logging.getLogger(__name__)

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


class Preprocessor(Protocol):
    """Reads texts for one model; `makes_arrays` if `pack` gives nothing but arrays and numbers."""

    makes_arrays: bool

    def prepare(
        self, texts: Sequence[str], prompt: str | None, task: str | None, side: Side | None, *, parallel: bool
    ) -> TokenizedTexts:
        """As Runtime.prepare."""

    def pack(self, batch: Batch) -> Features:
        """The input of a forward pass: int64 arrays of shape (rows, width), or what `preprocess` gives."""

    def for_copy(self, model: SentenceTransformer) -> "Preprocessor":
        """The preprocessor that packs what this one prepared for another copy of its model."""


def choose_preprocessor(
    model: SentenceTransformer, max_length: int, *, with_prompts: Iterable[str], threads: int
) -> Preprocessor:
    """The Rust tokenizer if, for probes with each prompt, it gives exactly what `preprocess` gives."""
    if isinstance(model[0], Transformer) and hasattr(model.tokenizer, "backend_tokenizer"):
        probes = [prompt + text for prompt in {"", *with_prompts} for text in PROBES]
        try:
            expected = {k: v for k, v in model.preprocess(probes).items() if isinstance(v, torch.Tensor)}
            tokenizer = _rust_tokenizer(model, max_length, names=set(expected), threads=threads)
            packed = tokenizer.pack([Rows.all_of(tokenizer.prepare(probes))])
            if packed.keys() == expected.keys() and all(
                np.array_equal(packed[name], expected[name].numpy()) for name in expected
            ):
                return tokenizer
            log.info("The model tokenizes for itself, which is slower")
        except Exception as error:
            log.warning("The model tokenizes for itself, which is slower: %s", error)
    return OwnPreprocessor(model, max_length)


# The Rust tokenizer


def _rust_tokenizer(
    model: SentenceTransformer, max_length: int, *, names: set[str], threads: int
) -> "RustTokenizer":
    """The tokenizer of a model whose inputs have these `names`."""
    own: Any = model.tokenizer
    pooling = find_pooling(model)
    without_prompt = pooling is not None and not pooling.include_prompt
    return RustTokenizer(
        own.backend_tokenizer.to_str(),
        max_length,
        truncation_side=own.truncation_side,
        pad_id=own.pad_token_id or 0,
        pads_left=own.padding_side == "left",
        with_type_ids="token_type_ids" in names,
        prompt_length=model[0]._get_prompt_length if without_prompt else None,
        threads=threads,
    )


class RustTokenizer:
    """Tokenizes with `encode_batch_fast`, which releases the GIL, and packs with numpy."""

    makes_arrays = True

    def __init__(
        self,
        tokenizer_json: str,
        max_length: int,
        *,
        truncation_side: Side,
        pad_id: int,
        pads_left: bool,
        with_type_ids: bool,
        prompt_length: Callable[[str], int | None] | None,
        threads: int = 1,
    ) -> None:
        """`prompt_length` counts the tokens of a prompt if the model's pooling leaves the prompt out.

        `threads` is how many a parallel `prepare` may use.
        """
        # Truncation and padding are state: the default model's tokenizer.json says truncation=128 and
        # padding=128, but the model reads 256 tokens.
        tokenizer = Tokenizer.from_str(tokenizer_json)
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length, direction=truncation_side)
        self._max_length = max_length
        self._by_side: dict[Side | None, Tokenizer] = {None: tokenizer, truncation_side: tokenizer}
        self._pad_id = pad_id
        self._pads_left = pads_left
        self._with_type_ids = with_type_ids
        self._prompt_length = prompt_length
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    def prepare(
        self,
        texts: Sequence[str],
        prompt: str | None = None,
        task: str | None = None,
        side: Side | None = None,
        *,
        parallel: bool = False,
    ) -> TokenizedTexts:
        prompt_length = None
        if prompt:
            prompt_length = self._prompt_length(prompt) if self._prompt_length else None
            texts = [prompt + text for text in texts]
        try:
            encodings = self._encode(texts, self._cutting(side), parallel)
        except TypeError:
            check_unicode(texts)
            raise
        lists = [encoding.ids for encoding in encodings]
        ends = list(accumulate(map(len, lists)))
        offsets = np.array([0, *ends], np.int32)
        lengths = offsets[1:] - offsets[:-1]
        ids = np.fromiter(chain.from_iterable(lists), np.int32, ends[-1])
        truncated = lengths >= self._max_length
        if truncated.any():
            for row in truncated.nonzero()[0].tolist():
                # A text may also be exactly as long as the limit.
                truncated[row] = bool(encodings[row].overflowing)
        return TokenizedTexts(lengths, truncated, prompt_length, ids, offsets[:-1])

    def _cutting(self, side: Side | None) -> Tokenizer:
        """The tokenizer that truncates at this side; most requests use the model's own side."""
        if side not in self._by_side:
            other = Tokenizer.from_str(self._by_side[None].to_str())
            other.enable_truncation(self._max_length, direction=side)
            self._by_side[side] = other
        return self._by_side[side]

    def _encode(self, texts: Sequence[str], tokenizer: Tokenizer, parallel: bool) -> list[Encoding]:
        shares = min(self._threads, len(texts) // TEXTS_WORTH_A_THREAD) if parallel else 1
        if shares <= 1:
            return tokenizer.encode_batch_fast(texts)
        bounds = [len(texts) * share // shares for share in range(shares + 1)]
        pieces = [texts[first:last] for first, last in pairwise(bounds)]
        return list(chain.from_iterable(self._pool.map(tokenizer.encode_batch_fast, pieces)))

    def pack(self, batch: Batch) -> Features:
        found = [part.tokenized.ids_of(part.rows) for part in batch]
        lengths = np.concatenate([part.lengths for part in batch])
        width = int(lengths.max())
        if len(lengths) * width == sum(map(len, found)):
            mask = np.ones((len(lengths), width), np.int64)
            ids = np.concatenate(found).astype(np.int64).reshape(mask.shape)
        else:
            columns = np.arange(width)
            real = columns >= (width - lengths)[:, None] if self._pads_left else columns < lengths[:, None]
            ids = np.full(real.shape, self._pad_id, np.int64)
            ids[real] = np.concatenate(found)
            mask = real.astype(np.int64)
        packed: Features = {"input_ids": ids, "attention_mask": mask}
        if self._with_type_ids:
            packed["token_type_ids"] = np.zeros_like(ids)
        prompt_length = batch[0].tokenized.group
        if prompt_length is not None:
            packed["prompt_length"] = prompt_length
        return packed

    def for_copy(self, model: SentenceTransformer) -> "RustTokenizer":
        return self


# The model's own preprocess


class OwnPreprocessor:
    """Leaves tokenizing to the model's `preprocess`, during the forward pass: correct, but slower."""

    makes_arrays = False

    def __init__(self, model: SentenceTransformer, max_length: int) -> None:
        self._model = model
        self._max_length = max_length
        self._cuts = length_limit(model) is not None
        self._routed = not isinstance(model[0], Transformer)

    def prepare(
        self,
        texts: Sequence[str],
        prompt: str | None = None,
        task: str | None = None,
        side: Side | None = None,
        *,
        parallel: bool = False,
    ) -> TokenizedTexts:
        if side == "left":
            raise InvalidRequest(
                "cannot be chosen: this model cuts its texts itself", field="truncation_side"
            )
        check_unicode(texts)
        lengths = np.fromiter((self._count((prompt or "") + text) for text in texts), np.int32, len(texts))
        truncated = lengths > self._max_length if self._cuts else np.zeros(len(texts), np.bool_)
        lengths[truncated] = self._max_length
        task = task if self._routed else None
        return TokenizedTexts(lengths, truncated, (prompt, task), texts=list(texts))

    def _count(self, text: str) -> int:
        """The number of tokens in a text, as far as the model's tokenizer can tell."""
        tokenizer = getattr(self._model[0], "tokenizer", None)
        if isinstance(tokenizer, Tokenizer):  # as StaticEmbedding has it
            return max(1, len(tokenizer.encode(text, add_special_tokens=False).ids))
        if tokenizer is not None and hasattr(tokenizer, "encode"):
            return max(1, len(tokenizer.encode(text, verbose=False)))
        return max(1, len(text) // 4)

    def pack(self, batch: Batch) -> Features:
        texts = [part.tokenized.texts[row] for part in batch for row in part.rows]
        prompt, task = cast(tuple[str | None, str | None], batch[0].tokenized.group)
        extra = {"task": task} if task else {}
        return {**self._model.preprocess(texts, prompt=prompt, **extra), **extra}

    def for_copy(self, model: SentenceTransformer) -> "OwnPreprocessor":
        return OwnPreprocessor(model, self._max_length)


def check_unicode(texts: Sequence[str]) -> None:
    """Raises InvalidRequest for the first text that is not Unicode."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("is not valid Unicode: it has a lone surrogate", index=index) from None
