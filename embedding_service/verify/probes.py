"""What a server is asked, how its vectors differ, and what is wrong with them in words."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np

from embedding_service.engine import Vectors
from embedding_service.verify.oracle import Oracle, unit
from embedding_service.verify.server import Refused, Server

SCRIPTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Der schnelle Fuchs: Äpfel, Öl und Übermut, groß wie Straße.",
    "Le garçon naïf a mangé une crème brûlée à Noël.",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "東京は日本の首都です。",
    "中文句子没有空格。",
    "한국어 문장입니다.",
    "اللغة العربية تكتب من اليمين إلى اليسار.",
    "भारत की राजधानी नई दिल्ली है।",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "Ελληνικά και עברית",
]
CASE = ["Apple released a new phone", "apple released a new phone", "APPLE RELEASED A NEW PHONE", "US", "us"]
SPACES = ["two  spaces", "two spaces", " before", "after ", "a\ttab", "a\nline", "a\r\nline", "no\u00a0break"]
EMOJI = ["👍", "👩‍👩‍👧 family", "flags 🇩🇪🇯🇵", "cafe\u0301", "café", "ﬁne ligature", "x² + y²", "a\u200bb"]
WORDS = [
    "Donaudampfschifffahrtskapitän",
    "https://example.com/a?b=c#d",
    "3.14159",
    "C++",
    "def f(x):",
]
PAIRS = [f"{first} {second}" for first in SCRIPTS[:8] for second in CASE + WORDS + ["", "yes", "no"]]
# Vectors of lower precision are still this near to the right ones.
NEAR_COSINE = 0.98
# A mistake explains the vectors if it leaves this share of the difference.
EXPLAINED = 0.3


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a probe has found; `finding` is what is wrong, and `refused` the server's refusal."""

    name: str
    texts: int
    largest_difference: float = 0.0
    lowest_cosine: float = 1.0
    finding: str | None = None
    refused: str | None = None

    def __str__(self) -> str:
        head = f"{self.name:<22}{self.texts:>6}"
        if self.refused:
            return f"{head}  not compared: {self.refused[:90]}"
        numbers = f"{self.largest_difference:>21.1e}{self.lowest_cosine:>16.7f}"
        return f"{head}{numbers}  {self.finding or ''}".rstrip()


class Verifier:
    """One comparison of a server with the oracle."""

    def __init__(self, server: Server, oracle: Oracle, tolerance: float) -> None:
        self._server, self._oracle, self._tolerance = server, oracle, tolerance
        self._is_another = False

    def run(self) -> Iterator[Result]:
        """The results of all probes, each when it is known."""
        alone = {"scripts": SCRIPTS, "case": CASE, "spaces": SPACES, "emoji": EMOJI, "words": WORDS}
        for name, texts in (alone | {"empty": ["", " "]}).items():
            yield self._probe(name, texts, self._alone)
        tokens = self._oracle.max_tokens
        for name, sizes in {
            "long": [share * tokens // 8 for share in (3, 5, 7)],
            "over-long": [2 * tokens, 3 * tokens],
        }.items():
            yield self._probe(name, [self._oracle.text_of(size) for size in sizes], self._alone, is_long=True)
        for size in (1, 2, 8, 32, 64):
            yield self._probe(f"batch of {size}", PAIRS[:size], self._server.embed)
        yield self._probe("reversed batch", PAIRS[31::-1], self._server.embed)
        yield self._probe("the same batch again", PAIRS[:32], self._server.embed)
        with ThreadPoolExecutor(8) as pool:
            yield self._probe(
                "concurrent calls",
                PAIRS[:48],
                lambda texts: np.concatenate([*pool.map(lambda text: self._server.embed([text]), texts)]),
            )
        api = self._server.api
        if api.prompt:
            for prompt in [*self._oracle.prompts.values()][:3] or ["search_query: "]:
                yield self._option("prompt", {api.prompt: prompt}, prompt=prompt)
        if api.dimensions:
            fewer = self._oracle.encode(SCRIPTS[:1]).shape[1] // 2
            yield self._option("dimensions", {api.dimensions: fewer}, dimensions=fewer)

    def _alone(self, texts: list[str]) -> Vectors:
        return np.concatenate([self._server.embed([text]) for text in texts])

    def _probe(
        self, name: str, texts: list[str], ask: Callable[[list[str]], Vectors], is_long: bool = False
    ) -> Result:
        """Compare the answers to `ask`, and those of single texts too if these differ."""
        try:
            vectors = ask(texts)
            right = self._oracle.encode(texts)
            result = self._compare(name, texts, vectors, right, is_long)
            if not result.finding or ask == self._alone or len(texts) == 1:
                return result
            if _difference(vectors[:8], self._alone(texts[:8])) <= self._tolerance:
                return result
        except Refused as refusal:
            return Result(name, len(texts), refused=str(refusal))
        except ValueError:
            return Result(name, len(texts), finding="the number of dimensions varies")
        finding = "the vector of a text depends on its batch"
        if _difference(np.sort(vectors, axis=0), np.sort(right, axis=0)) <= self._tolerance:
            finding = "the vectors are in another order than the texts"
        return msgspec.structs.replace(result, finding=finding)

    def _option(self, name: str, fields: dict[str, Any], **given: Any) -> Result:
        texts = SCRIPTS[:4]
        try:
            vectors, plain = self._server.embed(texts, **fields), self._server.embed(texts)
        except Refused as refusal:
            return Result(name, len(texts), refused=str(refusal))
        if vectors.shape == plain.shape and _difference(vectors, plain) <= self._tolerance:
            return Result(name, len(texts), refused="ignored")
        return self._compare(name, texts, vectors, self._oracle.encode(texts, **given), is_long=False)

    def _compare(
        self, name: str, texts: list[str], vectors: Vectors, right: Vectors, is_long: bool
    ) -> Result:
        nothing = Result(name, len(texts), float("inf"), -1.0)
        if vectors.shape != right.shape:
            words = f"another model: {vectors.shape[1]} dimensions, not {right.shape[1]}"
            return msgspec.structs.replace(nothing, finding=words)
        if not np.isfinite(vectors).all():
            return msgspec.structs.replace(nothing, finding="vectors hold numbers that are not finite")
        scaled = unit(vectors)
        cosines = (scaled * right).sum(axis=1)
        result = Result(name, len(texts), _difference(vectors, right), float(cosines.min()))
        if result.largest_difference <= self._tolerance:
            return result
        findings = []
        if np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > max(self._tolerance, 1e-2):
            findings.append("vectors are not normalised")
        wrong = np.flatnonzero(np.abs(scaled - right).max(axis=1) > self._tolerance)[:6]
        if len(wrong):
            findings.append(self._explain([texts[i] for i in wrong], scaled[wrong], right[wrong], is_long))
        return msgspec.structs.replace(result, finding="; ".join(findings) or "lower precision")

    def _explain(self, texts: list[str], found: Vectors, right: Vectors, is_long: bool) -> str:
        """The mistake that comes nearest to these vectors."""
        nearest, words = EXPLAINED * _difference(found, right), ""
        for mistake, vectors in self._oracle.mistakes(texts):
            if vectors.shape == found.shape and (difference := _difference(found, vectors)) < nearest:
                nearest, words = difference, mistake
        if words:
            return words
        if (found * right).sum(axis=1).min() >= NEAR_COSINE:
            return "lower precision"
        # If short texts are another model's, long ones are no fault of their own.
        self._is_another = self._is_another or not is_long
        return "another model" if self._is_another else "long texts are read differently"


def _difference(one: Vectors, other: Vectors) -> float:
    return float(np.abs(one - other).max())
