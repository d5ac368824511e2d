"""The right vectors, and those of the usual mistakes, from sentence-transformers."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embedding_service.engine import Vectors
from embedding_service.inference import source

# Lengths at which other servers cut texts.
CUTS = (32, 64, 127, 128, 254, 255, 256, 257, 258, 384, 510, 511, 512, 514, 1024, 2048, 4096, 8192)


class Oracle:
    """SentenceTransformer on the CPU. All vectors are float32 of length 1."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        """Raises StartupError if there is no such model."""
        self._model = SentenceTransformer(str(source.resolve(name, revision).folder), device="cpu")
        self.max_tokens: int = min(self._model.max_seq_length or 8192, 8192)
        self.prompts: dict[str, str] = {k: v for k, v in self._model.prompts.items() if v}

    def encode(self, texts: list[str], prompt: str | None = None, dimensions: int | None = None) -> Vectors:
        """The right vectors."""
        made = self._model.encode(texts, prompt=prompt, truncate_dim=dimensions, normalize_embeddings=True)
        return np.asarray(made, np.float32)

    def text_of(self, tokens: int) -> str:
        """A text of about this many tokens, each of which matters."""
        words = (f"{word} {number}" for number in range(tokens) for word in ("river", "stone", "cloud"))
        ids: list[int] = self._model.tokenizer(" ".join(words), truncation=False, verbose=False)["input_ids"]
        text: str = self._model.tokenizer.decode(ids[:tokens], skip_special_tokens=True)
        return text

    def mistakes(self, texts: list[str]) -> Iterator[tuple[str, Vectors]]:
        """The vectors that a mistake would give, after the mistake in words."""
        limit, tokenizer = self._model.max_seq_length, self._model.tokenizer
        longest = max(map(len, tokenizer(texts, truncation=False, verbose=False)["input_ids"]))
        config = getattr(getattr(self._model[0], "auto_model", None), "config", None)
        positions = getattr(config, "max_position_embeddings", 8192)
        for cut in CUTS:
            if cut != limit and cut < longest and cut <= positions:
                vectors = self._changed(texts, self._model, "max_seq_length", cut)
                yield f"texts are cut at {cut} tokens, not at {limit}", vectors
        other = "left" if tokenizer.truncation_side == "right" else "right"
        yield "texts are cut at their other end", self._changed(texts, tokenizer, "truncation_side", other)
        for name, prompt in self.prompts.items():
            yield f"the prompt {name!r} is put in front of the texts", self.encode(texts, prompt)
        yield "upper and lower case are not told apart", self.encode([text.lower() for text in texts])
        try:
            tokens = self._model.encode(texts, output_value="token_embeddings")
            lists, are_special = self._ids(texts)
        except (KeyError, AttributeError, TypeError, ValueError):
            return  # a model without tokens of its own, or without a tokenizer
        for words, pool in POOLINGS.items():
            yield words, unit(np.stack([pool(each.float().numpy()) for each in tokens]))
        if are_special:
            for words, change in SPECIAL.items():
                changed = [change(ids) for ids in lists]
                if all(changed):
                    yield words, self._forward(changed)

    def _changed(self, texts: list[str], target: Any, name: str, value: Any) -> Vectors:
        """The vectors with another value of an attribute."""
        before = getattr(target, name)
        setattr(target, name, value)
        try:
            return self.encode(texts)
        finally:
            setattr(target, name, before)

    def _ids(self, texts: list[str]) -> tuple[list[list[int]], bool]:
        """The tokens of each text, and whether the first and the last of all are special."""
        made = self._model.tokenizer(
            texts, truncation=True, max_length=self._model.max_seq_length, return_special_tokens_mask=True
        )
        return made["input_ids"], all(mask[0] and mask[-1] for mask in made["special_tokens_mask"])

    def _forward(self, lists: list[list[int]]) -> Vectors:
        padded = self._model.tokenizer.pad({"input_ids": lists}, return_tensors="pt")
        with torch.inference_mode():
            vectors: Vectors = self._model(dict(padded))["sentence_embedding"].float().numpy()
        return unit(vectors)


Pool = Callable[[Vectors], Vectors]
POOLINGS: dict[str, Pool] = {
    "another pooling: the first token's vector": lambda tokens: tokens[0],
    "another pooling: the last token's vector": lambda tokens: tokens[-1],
    "another pooling: the mean of all tokens": lambda tokens: tokens.mean(0),
    "another pooling: the largest number of each dimension": lambda tokens: tokens.max(0),
    "another pooling: special tokens are left out": lambda tokens: (
        tokens[1:-1] if tokens[2:].size else tokens
    ).mean(0),
}
SPECIAL: dict[str, Callable[[list[int]], list[int]]] = {
    "special tokens differ: none are added": lambda ids: ids[1:-1],
    "special tokens differ: the last is missing": lambda ids: ids[:-1],
    "special tokens differ: the first is missing": lambda ids: ids[1:],
    "special tokens differ: they are added twice": lambda ids: [ids[0], *ids, ids[-1]],
}


def unit(vectors: Vectors) -> Vectors:
    """The vectors at length 1; one of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return scaled
