"""Chooses what reads a model's texts: the Rust tokenizer, if it equals the model's own `preprocess`."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from tokenizers import Tokenizer

from embedding_service.engine import Text
from embedding_service.errors import InvalidRequest
from embedding_service.inference.checkpoint import find_pooling, length_limit
from embedding_service.inference.prepared import Reference, same_inputs
from embedding_service.inference.preprocessing import (
    PROBES,
    Features,
    Preprocessor,
    RustTokenizer,
    TokenizerFacts,
    decode_ids,
    without_limits,
)
from embedding_service.inference.runtime import Side
from embedding_service.inference.tokenized import Batch, TokenizedTexts

log = logging.getLogger(__name__)


def choose_preprocessor(
    model: SentenceTransformer, max_length: int, *, prompts: Iterable[str], threads: int
) -> Preprocessor:
    """The Rust tokenizer if, for probes with each prompt, it gives exactly what `preprocess` gives."""
    if isinstance(model[0], Transformer) and hasattr(model.tokenizer, "backend_tokenizer"):
        try:
            expected = [Reference(prompt, inputs_in_torch(model, prompt)) for prompt in prompts]
            inputs = [name for name, value in expected[0].inputs.items() if isinstance(value, np.ndarray)]
            tokenizer = RustTokenizer(tokenizer_facts(model, max_length, inputs), threads)
            if same_inputs(tokenizer, expected):
                return tokenizer
            log.info("The model tokenizes for itself, which is slower")
        except Exception as error:
            log.warning("The model tokenizes for itself, which is slower: %s", error)
    return OwnPreprocessor(model, max_length)


def inputs_in_torch(model: SentenceTransformer, prompt: str) -> dict[str, Any]:
    """What the model's own `preprocess` gives for the probes with a prompt, as far as vectors need it."""
    found: dict[str, Any] = model.preprocess(PROBES, prompt=prompt)
    inputs = {name: value.numpy() for name, value in found.items() if isinstance(value, torch.Tensor)}
    if _leaves_prompt_out(model) and "prompt_length" in found:
        inputs["prompt_length"] = found["prompt_length"]
    return inputs


def tokenizer_facts(model: SentenceTransformer, max_length: int, inputs: list[str]) -> TokenizerFacts:
    """What the Rust tokenizer of a transformer needs; `inputs` are the names of the model's inputs."""
    own: Any = model.tokenizer
    return TokenizerFacts(
        # A copy, since truncation and padding are state: the default model's tokenizer.json says
        # truncation=128 and padding=128, but the model reads 256 tokens.
        serialized=own.backend_tokenizer.to_str(),
        max_length=max_length,
        truncation_side=own.truncation_side,
        pad_id=own.pad_token_id or 0,
        pads_left=own.padding_side == "left",
        inputs=inputs,
        prompt_left_out=_leaves_prompt_out(model),
        special_ids=list(own.all_special_ids),
    )


def _leaves_prompt_out(model: SentenceTransformer) -> bool:
    pooling = find_pooling(model)
    return pooling is not None and not pooling.include_prompt


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
        texts: Sequence[Text],
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
        own: Any = getattr(self._model[0], "tokenizer", None)
        index = next((index for index, text in enumerate(texts) if not isinstance(text, str)), None)
        if index is not None and not isinstance(own, Tokenizer):
            raise InvalidRequest("is token ids, which this model cannot read", index=index)
        texts = decode_ids(own, texts, skip_special_tokens=bool(prompt))
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

    def plain(self) -> Tokenizer:
        own: Any = getattr(self._model[0], "tokenizer", None)
        backend = getattr(own, "backend_tokenizer", own)
        if not isinstance(backend, Tokenizer):
            raise InvalidRequest("this model's tokenizer cannot list tokens")
        return without_limits(backend)

    def pack(self, batch: Batch) -> Features:
        texts = [part.tokenized.texts[row] for part in batch for row in part.rows]
        prompt, task = cast(tuple[str | None, str | None], batch[0].tokenized.group)
        extra = {"task": task} if task else {}
        return {**self._model.preprocess(texts, prompt=prompt, **extra), **extra}

    def for_copy(self, model: SentenceTransformer) -> "OwnPreprocessor":
        return OwnPreprocessor(model, self._max_length)
