"""The right vectors, and those of the usual mistakes, from sentence-transformers."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from embedding_service.engine import Vectors
from embedding_service.inference import source

# Lengths at which other servers cut texts.
CUTS = (32, 64, 127, 128, 254, 255, 256, 257, 258, 384, 510, 511, 512, 514, 1024, 2048, 4096, 8192)
# Mistakes with the vectors of a text's tokens, and with their ids.
POOLINGS: dict[str, Callable[[Vectors], Vectors]] = {
    "the first token's vector": lambda tokens: tokens[0],
    "the last token's vector": lambda tokens: tokens[-1],
    "the mean of all tokens": lambda tokens: tokens.mean(0),
    "the largest number of each dimension": lambda tokens: tokens.max(0),
    "special tokens are left out": lambda tokens: (tokens[1:-1] if len(tokens) > 2 else tokens).mean(0),
}
SPECIAL: dict[str, Callable[[list[int]], list[int]]] = {
    "none are added": lambda ids: ids[1:-1],
    "the last is missing": lambda ids: ids[:-1],
    "the first is missing": lambda ids: ids[1:],
    "they are added twice": lambda ids: [ids[0], *ids, ids[-1]],
}


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
        """A text of about this many tokens, all of which matter."""
        words = (f"{word} {number}" for number in range(tokens) for word in ("river", "stone", "cloud"))
        ids: list[int] = self._model.tokenizer(" ".join(words), truncation=False, verbose=False)["input_ids"]
        text: str = self._model.tokenizer.decode(ids[:tokens], skip_special_tokens=True)
        return text

    def mistakes(self, texts: list[str]) -> Iterator[tuple[str, Vectors]]:
        """The vectors that a mistake would give, after the mistake in words."""
        model, limit, tokenizer = self._model, self._model.max_seq_length, self._model.tokenizer
        longest = max(map(len, tokenizer(texts, truncation=False, verbose=False)["input_ids"]))
        config = getattr(getattr(model[0], "auto_model", None), "config", None)
        most = min(longest - 1, getattr(config, "max_position_embeddings", 8192))
        for cut in (cut for cut in CUTS if cut != limit and cut <= most):
            yield (
                f"texts are cut at {cut} tokens, not at {limit}",
                self._with(model, "max_seq_length", cut, texts),
            )
        end = "left" if tokenizer.truncation_side == "right" else "right"
        yield "texts are cut at their other end", self._with(tokenizer, "truncation_side", end, texts)
        for name, prompt in self.prompts.items():
            yield f"the prompt {name!r} is put in front of the texts", self.encode(texts, prompt)
        yield "upper and lower case are not told apart", self.encode([text.lower() for text in texts])
        try:
            tokens = model.encode(texts, output_value="token_embeddings")
            ids = tokenizer(texts, truncation=True, max_length=limit, return_special_tokens_mask=True)
        except (KeyError, AttributeError, TypeError, ValueError):
            return  # a model without tokens of its own, or without a tokenizer
        for words, pool in POOLINGS.items():
            yield f"another pooling: {words}", unit(np.stack([pool(each.float().numpy()) for each in tokens]))
        for words, change in SPECIAL.items():
            changed = [change(each) for each in ids["input_ids"]]
            if all(changed) and all(mask[0] and mask[-1] for mask in ids["special_tokens_mask"]):
                padded = tokenizer.pad({"input_ids": changed}, return_tensors="pt")
                vectors = model(padded)["sentence_embedding"].detach().numpy()
                yield f"special tokens differ: {words}", unit(vectors)

    def _with(self, target: Any, name: str, value: Any, texts: list[str]) -> Vectors:
        """The vectors with another value of an attribute."""
        before = getattr(target, name)
        setattr(target, name, value)
        try:
            return self.encode(texts)
        finally:
            setattr(target, name, before)


def unit(vectors: Vectors) -> Vectors:
    """The vectors at length 1; one of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
