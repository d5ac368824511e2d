"""The sweep behind the CPU token budget: how a batch's size in tokens changes its speed and its time.

For each length of text and each budget, batches of as many texts as fit are run in turn, so that what
disturbs the machine disturbs all alike; where the model has several lanes, one batch in each at once.
A wider batch is worth it while it raises tokens per second; past that it only makes the next request
wait longer.

python -m benchmarks.sweep_budget --backend openvino
"""

import argparse
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.raw_engine import RawEngine
from benchmarks.texts import Texts
from embedding_service.inference import source
from embedding_service.inference.runtime import Batch, Slice

LENGTHS = (11, 32, 64, 128, 256)
BUDGETS = (64, 128, 256, 384, 512, 768, 1024, 2048, 4096)


def sweep(engine: RawEngine, rounds: int) -> dict[int, dict[int, float]]:
    """Median seconds of a batch, by length of text and then by budget; only where a text fits."""
    texts = Texts(source.resolve(source.DEFAULT_MODEL, None).folder)
    batches: dict[tuple[int, int], Batch] = {}
    for length in LENGTHS:
        pool = engine.model.prepare(texts.of_length(length, max(BUDGETS) // length), None, None)
        for budget in BUDGETS:
            if budget >= length:
                batches[length, budget] = [Slice(pool, np.arange(budget // length, dtype=np.int32))]
    lanes = engine.model.lanes
    took = defaultdict(list)
    with ThreadPoolExecutor(len(lanes)) as threads:
        for number in range(rounds + 1):
            for key, batch in batches.items():
                began = time.perf_counter()
                runs = [threads.submit(lane.forward, batch) for lane in lanes]
                for run in runs:
                    run.result()
                if number:  # the first round warms up
                    took[key].append(time.perf_counter() - began)
    medians: dict[int, dict[int, float]] = defaultdict(dict)
    for (length, budget), seconds in took.items():
        medians[length][budget] = float(np.median(seconds))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "openvino"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    engine = RawEngine(arguments.backend, arguments.device, arguments.dtype)
    medians = sweep(engine, arguments.rounds)
    lanes = len(engine.model.lanes)
    print(f"Tokens per second, and ms per batch ({engine.name}, {lanes} at once):\n")
    print("| budget | " + " | ".join(f"{length} tokens" for length in LENGTHS) + " |")
    print("|---:|" + "---:|" * len(LENGTHS))
    for budget in BUDGETS:
        cells = []
        for length in LENGTHS:
            seconds = medians[length].get(budget)
            tokens = budget // length * length * lanes
            cells.append(f"{tokens / seconds:.0f} ({seconds * 1e3:.1f})" if seconds else "")
        print(f"| {budget} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
