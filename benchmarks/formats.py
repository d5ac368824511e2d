"""How much retrieval loses with smaller number formats: `python -m benchmarks.formats` (minutes on a CPU).

The texts are spliced from English sentences and all different: documents, queries, and others for the
ranges of int8. Prints the table of docs/formats.md.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from benchmarks import machine
from benchmarks.texts import Texts
from embedding_service.engine import Int8Ranges, Vectors
from embedding_service.inference import source
from embedding_service.quantization import STEPS, find_ranges, quantize

DOCUMENTS, QUERIES, OTHERS = 3500, 500, 2000
NEAREST, CANDIDATES = 10, 40

Scores = npt.NDArray[np.float32]


def ways(documents: Vectors, queries: Vectors, ranges: Int8Ranges) -> Iterator[tuple[str, Scores]]:
    """Each way to search, and how near it finds each document to each query: the higher, the nearer."""
    half = (quantize(vectors, "float16").astype(np.float32) for vectors in (queries, documents))
    yield "float16", dot(*half)
    restored = restore(quantize(documents, "uint8", ranges), ranges)
    yield "uint8 documents converted back to floats, float32 queries", dot(queries, restored)
    whole = (quantize(vectors, "int8", ranges).astype(np.float32) for vectors in (queries, documents))
    yield "int8, plain dot product", dot(*whole)
    yield "binary documents, float32 queries", dot(queries, signs(documents))
    hamming = dot(signs(queries), signs(documents))
    yield "binary, Hamming distance", hamming
    rescored = np.full_like(hamming, -np.inf)
    found = nearest(hamming, CANDIDATES)
    np.put_along_axis(rescored, found, np.take_along_axis(dot(queries, documents), found, axis=1), axis=1)
    yield f"binary, with the nearest {CANDIDATES} compared again in float32", rescored


def dot(queries: Scores, documents: Scores) -> Scores:
    product: Scores = queries @ documents.T
    return product


def signs(vectors: Scores) -> Scores:
    """1 for each bit that is set, -1 for the others: their products rank as Hamming distances do."""
    return np.where(vectors > 0, np.float32(1), np.float32(-1))


def restore(values: npt.NDArray[np.uint8], ranges: Int8Ranges) -> Scores:
    """The middle of each step."""
    starts, ends = np.array(ranges.minimum, np.float32), np.array(ranges.maximum, np.float32)
    return (starts + (values + np.float32(0.5)) * (ends - starts) / STEPS).astype(np.float32)


def nearest(scores: Scores, count: int) -> npt.NDArray[np.int64]:
    """The documents with the highest scores of each query, the nearest first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def main() -> None:
    folder = source.resolve(machine.model(), None).folder
    model = SentenceTransformer(str(folder), device="cpu")
    texts = Texts(folder).sentences(DOCUMENTS + QUERIES + OTHERS)
    vectors = model.encode(texts, normalize_embeddings=True)
    documents, queries, others = np.split(vectors, [DOCUMENTS, DOCUMENTS + QUERIES])
    expected = nearest(dot(queries, documents), NEAREST)
    print("| documents and queries | same ten, on average | same nearest |\n|---|---:|---:|")
    for way, scores in ways(documents, queries, find_ranges(others, "")):
        got = nearest(scores, NEAREST)
        same = [len(np.intersect1d(*pair)) / NEAREST for pair in zip(got, expected, strict=True)]
        first = (got[:, 0] == expected[:, 0]).mean()
        print(f"| {way} | {np.mean(same):.1%} | {first:.0%} |")
    described = machine.describe()
    print(f"\n{described['cpu']}, commit {machine.commit()}")


if __name__ == "__main__":
    main()
