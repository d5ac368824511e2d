"""What a server is asked, how its vectors differ, and what is wrong with them in words."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np

from embedding_service.engine import Vectors
from embedding_service.verify.oracle import Oracle, unit
from embedding_service.verify.server import Refused, Server

# Vectors of lower precision are still this near to the right ones.
NEAR_COSINE = 0.98
# A mistake explains the vectors if it leaves this share of the difference.
EXPLAINED = 0.3


class Probe(NamedTuple):
    """Texts, how many go in a request, how many requests at a time, and an option besides."""

    name: str
    texts: list[str]
    batch: int = 1
    at_a_time: int = 1
    option: Mapping[str, Any] = MappingProxyType({})
    is_long: bool = False


def probes(oracle: Oracle, options: tuple[str, ...]) -> Iterator[Probe]:
    """All probes of a server that has these options."""
    texts: dict[str, list[str]] = msgspec.json.decode(Path(__file__).with_name("texts.json").read_bytes())
    yield from (Probe(name, group) for name, group in texts.items())
    for name, eighths in {"long": (3, 5, 7), "over-long": (16, 24)}.items():
        sizes = [share * oracle.max_tokens // 8 for share in eighths]
        yield Probe(name, [oracle.text_of(size) for size in sizes], is_long=True)
    scripts, ends = texts["scripts"], texts["case"] + texts["words"] + ["", "yes", "no"]
    pairs = [f"{first} {second}" for first in scripts[:8] for second in ends]
    yield from (Probe(f"batch of {size}", pairs[:size], size) for size in (1, 2, 8, 32, 64))
    yield Probe("reversed batch", pairs[31::-1], batch=32)
    yield Probe("the same batch again", pairs[:32], batch=32)
    yield Probe("concurrent calls", pairs[:48], at_a_time=8)
    prompts = [*oracle.prompts.values()][:3] or ["search_query: "]
    fewer = oracle.encode(scripts[:1]).shape[1] // 2
    for name, value in [*(("prompt", prompt) for prompt in prompts), ("dimensions", fewer)]:
        if name in options:
            yield Probe(name, scripts[:4], batch=4, option={name: value})


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
        for probe in probes(self._oracle, self._server.api.options):
            right = self._oracle.encode(probe.texts, **probe.option)
            found: dict[str, Any] = {"largest_difference": inf, "lowest_cosine": -1.0}
            try:
                vectors = self._ask(probe)
                if probe.option and self._is_same(vectors, self._ask(probe._replace(option={}))):
                    raise Refused("ignored")
                if not vectors.size:
                    found["finding"] = "the number of dimensions varies"
                elif vectors.shape != right.shape:
                    found["finding"] = f"another model: {vectors.shape[1]} dimensions, not {right.shape[1]}"
                elif not np.isfinite(vectors).all():
                    found["finding"] = "vectors hold numbers that are not finite"
                else:
                    cosine = float((unit(vectors) * right).sum(axis=1).min())
                    found = {"largest_difference": _difference(vectors, right), "lowest_cosine": cosine}
                    found["finding"] = self._finding(probe, vectors, right)
            except Refused as refusal:
                found = {"refused": str(refusal)}
            yield Result(probe.name, len(probe.texts), **found)

    def _ask(self, probe: Probe) -> Vectors:
        """The server's vectors; without any number if not all are equally long."""
        parts = [probe.texts[at : at + probe.batch] for at in range(0, len(probe.texts), probe.batch)]
        with ThreadPoolExecutor(probe.at_a_time) as pool:
            vectors = [*pool.map(lambda texts: self._server.embed(texts, **probe.option), parts)]
        is_even = len({each.shape[1] for each in vectors}) == 1
        return np.concatenate(vectors if is_even else [each[:, :0] for each in vectors])

    def _finding(self, probe: Probe, vectors: Vectors, right: Vectors) -> str | None:
        """What is wrong with these vectors; None if they are right."""
        if self._is_same(vectors, right):
            return None
        alone = probe._replace(texts=probe.texts[:8], batch=1)
        if probe.batch > 1 < len(right) and not self._is_same(vectors[:8], self._ask(alone)):
            if self._is_same(np.sort(vectors, axis=0), np.sort(right, axis=0)):
                return "the vectors are in another order than the texts"
            return "the vector of a text depends on its batch"
        findings, scaled = [], unit(vectors)
        if np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > max(self._tolerance, 1e-2):
            findings.append("vectors are not normalised")
        wrong = np.flatnonzero(np.abs(scaled - right).max(axis=1) > self._tolerance)[:6]
        if len(wrong):
            findings.append(self._mistake(probe, wrong, scaled[wrong], right[wrong]))
        where = f"with {probe.name}: " if probe.option else ""
        return where + ("; ".join(findings) or "lower precision")

    def _mistake(self, probe: Probe, places: Iterable[int], vectors: Vectors, right: Vectors) -> str:
        """The mistake that comes nearest to the vectors of the texts at these places."""
        nearest, words = EXPLAINED * _difference(vectors, right), ""
        for mistake, wrong in self._oracle.mistakes([probe.texts[place] for place in places]):
            if wrong.shape == vectors.shape and _difference(vectors, wrong) < nearest:
                nearest, words = _difference(vectors, wrong), mistake
        if words:
            return words
        if (vectors * right).sum(axis=1).min() >= NEAR_COSINE:
            return "lower precision"
        # If short texts are another model's, long ones are no fault of their own.
        self._is_another = self._is_another or not probe.is_long
        return "another model" if self._is_another else "long texts are read differently"

    def _is_same(self, one: Vectors, other: Vectors) -> bool:
        return one.shape == other.shape and _difference(one, other) <= self._tolerance


def _difference(one: Vectors, other: Vectors) -> float:
    return float(np.abs(one - other).max())
