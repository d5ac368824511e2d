"""The texts of the benchmarks: sentences, texts of a given number of tokens, and a mix of lengths."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

SENTENCES = Path(__file__).with_name("sentences.txt").read_text().splitlines()

# The mix: median 24 tokens, mean about 38, a tenth above 80; truncated to the model's maximum.
MIX_MEDIAN, MIX_SIGMA, MIX_SHORTEST, MIX_LONGEST = 24, 1.0, 4, 256


class Texts:
    """Makes texts that all differ, and are the same in every run."""

    def __init__(self, model_folder: Path, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._halves = [self._cut(sentence) for sentence in SENTENCES]

    def sentences(self, count: int) -> list[str]:
        """Texts made of half of one sentence and half of another: about 11 tokens, like the sentences."""
        seen: dict[str, None] = {}
        while len(seen) < count:
            first, second = self._random.sample(self._halves, 2)
            seen[f"{first[0]} {second[1]}"] = None
        return list(seen)

    def of_length(self, tokens: int, count: int) -> list[str]:
        """Texts of exactly `tokens` tokens, including the two special ones."""
        return [self._exactly(tokens) for _ in range(count)]

    def mix(self, count: int) -> list[str]:
        """Texts whose lengths are log-normal."""
        lengths = self._numbers.lognormal(np.log(MIX_MEDIAN), MIX_SIGMA, count)
        return [self._exactly(int(n)) for n in np.clip(lengths, MIX_SHORTEST, MIX_LONGEST)]

    def _exactly(self, tokens: int) -> str:
        wanted = tokens - 2
        text = ""
        for sentence in self._endless():
            text = f"{text} {sentence}".strip()
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            if len(encoding.ids) >= wanted:
                cut = text[: encoding.offsets[wanted - 1][1]]
                # A word that is cut in two may get other tokens than it had as a whole; then try again.
                if len(self._tokenizer.encode(cut).ids) == tokens:
                    return cut
                text = ""
        raise AssertionError

    def _endless(self) -> Iterator[str]:
        while True:
            yield self._random.choice(SENTENCES)

    @staticmethod
    def _cut(sentence: str) -> tuple[str, str]:
        words = sentence.split()
        half = len(words) // 2
        return " ".join(words[:half]), " ".join(words[half:])
