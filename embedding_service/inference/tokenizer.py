"""The tokenizer of the hot path: Rust, without the GIL, and used only where it equals the model's own."""

import logging
from collections.abc import Hashable, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from tokenizers import Tokenizer

from embedding_service.engine import TokenizedText
from embedding_service.errors import InvalidRequest
from embedding_service.inference.runtime import Tokens

log = logging.getLogger(__name__)


class FastTokenizer:
    """Tokenises with `encode_batch_fast` and packs with numpy what `preprocess` would have made."""

    def __init__(self, model: SentenceTransformer, max_length: int, names: set[str]) -> None:
        own: Any = model.tokenizer
        # A copy, since truncation and padding are state: the default model's tokenizer.json says
        # truncation=128 and padding=128, where the model reads 256 tokens.
        self._tokenizer: Tokenizer = Tokenizer.from_str(own.backend_tokenizer.to_str())
        self._tokenizer.enable_truncation(max_length, direction=own.truncation_side)
        self._tokenizer.no_padding()
        self._by_side: dict[str | None, Tokenizer] = {
            None: self._tokenizer,
            own.truncation_side: self._tokenizer,
        }
        self._max_length = max_length
        self._pad_id: int = own.pad_token_id or 0
        self._pads_left = own.padding_side == "left"
        self._with_type_ids = "token_type_ids" in names

    @classmethod
    def build(cls, model: SentenceTransformer, max_length: int, probes: list[str]) -> Self | None:
        """The tokenizer for this model, or None where the model must tokenise for itself.

        Whether it may is measured: for the probes it must give the features that `preprocess` gives.
        """
        own = getattr(model, "tokenizer", None)
        if not isinstance(model[0], Transformer) or not hasattr(own, "backend_tokenizer"):
            return None
        try:
            expected = model.preprocess(probes)
            wanted = {k: v.numpy() for k, v in expected.items() if isinstance(v, torch.Tensor)}
            tokenizer = cls(model, max_length, set(wanted))
            packed = tokenizer.pack(tokenizer.tokenize(probes, None))
        except Exception as error:
            log.warning("The model tokenises for itself, which is slower: %s", error)
            return None
        if packed.keys() != wanted.keys() or any(
            not np.array_equal(packed[name], wanted[name]) for name in wanted
        ):
            log.info("The model tokenises for itself, which is slower")
            return None
        return tokenizer

    def tokenize(
        self, texts: Sequence[str], group: Hashable, side: Literal["left", "right"] | None = None
    ) -> list[Tokens]:
        """Raises TypeError where a text is not valid Unicode."""
        if side not in self._by_side:
            other = Tokenizer.from_str(self._tokenizer.to_str())
            other.enable_truncation(self._max_length, direction=side)
            self._by_side[side] = other
        return [
            Tokens(
                ids=encoding.ids,
                length=len(encoding.ids),
                truncated=bool(encoding.overflowing),
                group=group,
            )
            for encoding in self._by_side[side].encode_batch_fast(texts)
        ]

    def pack(self, batch: Sequence[Tokens]) -> dict[str, Any]:
        """Arrays of int64, of shape (texts, longest text)."""
        width = max(tokens.length for tokens in batch)
        ids = np.full((len(batch), width), self._pad_id, np.int64)
        mask = np.zeros((len(batch), width), np.int64)
        for row, tokens in enumerate(batch):
            span = slice(width - tokens.length, None) if self._pads_left else slice(tokens.length)
            ids[row, span] = tokens.ids or []
            mask[row, span] = 1
        packed = {"input_ids": ids, "attention_mask": mask}
        if self._with_type_ids:
            packed["token_type_ids"] = np.zeros_like(ids)
        return packed


class TokenLister:
    """Lists every token of a text with its place in it: slower than FastTokenizer, and it never cuts."""

    def __init__(self, model: SentenceTransformer) -> None:
        """Raises InvalidRequest where the model's tokenizer does not tell where a token stands."""
        own: Any = getattr(model[0], "tokenizer", None)
        backend = getattr(own, "backend_tokenizer", own)
        if not isinstance(backend, Tokenizer):
            raise InvalidRequest("this model's tokenizer does not tell its tokens")
        self._tokenizer: Tokenizer = Tokenizer.from_str(backend.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def list(self, texts: Sequence[str], add_special_tokens: bool) -> list[TokenizedText]:
        """The tokens of each text, at offsets in its characters."""
        listed = []
        for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens):
            special = {i: encoding.tokens[i] for i, flag in enumerate(encoding.special_tokens_mask) if flag}
            offsets = encoding.offsets
            starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
            listed.append(TokenizedText(encoding.ids, starts, stops, special))
        return listed
