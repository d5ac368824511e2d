"""Compares the token budget that the service found with the best one of a sweep, on this machine.

python -m benchmarks.sweep_budget [--backend torch] [--dtype bfloat16]

For each text length and budget it prints tokens per second with all streams running, and ms per batch.
"""

import argparse
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from benchmarks.texts import Texts
from embedding_service.inference import source
from embedding_service.inference.loading import load
from embedding_service.inference.model import Model
from embedding_service.inference.tokenized import Batch, Rows
from embedding_service.settings.config import Config

LENGTHS = (11, 64, 256)
SWEPT = (64, 128, 256, 384, 512, 768, 1024, 2048)


def sweep(model: Model, budgets: tuple[int, ...], rounds: int) -> dict[int, dict[int, tuple[float, float]]]:
    """Tokens per second and seconds per batch (the best of the rounds), by text length and budget."""
    texts = Texts(source.resolve(source.DEFAULT_MODEL, None).folder)
    batches: dict[tuple[int, int], Batch] = {}
    for length in LENGTHS:
        for budget in budgets:
            if budget >= length:
                pool = texts.of_length(length, budget // length)
                batches[length, budget] = [Rows.all_of(model.preprocessor.prepare(pool, None, None))]
    fastest: dict[tuple[int, int], float] = {}
    with ThreadPoolExecutor(len(model.streams)) as threads:
        for _ in range(rounds):
            for key, batch in batches.items():
                began = time.perf_counter()
                list(threads.map(lambda stream, batch=batch: stream.forward(batch), model.streams))
                took = time.perf_counter() - began
                fastest[key] = min(took, fastest.get(key, took))
    found: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for (length, budget), seconds in fastest.items():
        tokens = budget // length * length * len(model.streams)
        found[length][budget] = (tokens / seconds, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "openvino"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    settings = Config(
        embedding_model=source.DEFAULT_MODEL,
        backend=arguments.backend,
        device=arguments.device,
        dtype=arguments.dtype,
        cache_folder="",
    )
    model = load(settings)
    own = model.budget.tokens
    rates = sweep(model, tuple(sorted({*SWEPT, own})), arguments.rounds)
    print(
        f"{model.info.backend}, {model.info.dtype}, {len(model.streams)} at once: found {own} tokens, ",
        end="",
    )
    print(f"overhead {model.budget.overhead_tokens}, {model.budget.batch_seconds * 1e3:.0f} ms expected\n")
    print(
        "| tokens a text | "
        + " | ".join(str(budget) for budget in sorted({*SWEPT, own}))
        + " | found / best |"
    )
    print("|---:|" + "---:|" * (len({*SWEPT, own}) + 1))
    for length in LENGTHS:
        row = rates[length]
        cells = [
            f"{row[budget][0]:.0f} ({row[budget][1] * 1e3:.0f})" if budget in row else ""
            for budget in sorted({*SWEPT, own})
        ]
        share = row[own][0] / max(rate for rate, _ in row.values())
        print(f"| {length} | " + " | ".join(cells) + f" | {share:.2f} |")


if __name__ == "__main__":
    main()
