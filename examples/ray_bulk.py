"""Embed a corpus of Parquet files on Ray Data with the service's own engine; an interrupted run resumes.

    pip install -c constraints.txt '.[ray]'
    python examples/ray_bulk.py corpus/ vectors/ --actors 8 --device cuda

Each row needs a unique id and a text. The output is Parquet, with the embedding added to each row. On a
cluster (RAY_ADDRESS), both folders must be on storage that every node can access.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import ray
from ray.data.checkpoint import CheckpointConfig

from embedding_service.engine import EmbedRequest
from embedding_service.inference.local import LocalEngine
from embedding_service.settings.config import Config

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 3600.0


class Embed:
    """An actor with a model of its own."""

    def __init__(self, settings: Config, text: str) -> None:
        self._engine = LocalEngine(settings)
        self._text = text
        self._engine.wait_loaded()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        request = EmbedRequest(
            texts=[str(text) for text in batch[self._text]], deadline=time.monotonic() + PATIENCE_SECONDS
        )
        return batch | {"embedding": self._engine.call(request).vectors}


def main() -> None:
    """Read, embed, write. Rows whose vectors are on disk are not embedded again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("input", help="folder of Parquet files")
    parser.add_argument("output", help="folder for Parquet files")
    parser.add_argument("--id", default="id", help="column with a unique id")
    parser.add_argument("--text", default="text", help="column with the text")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with one GPU for each actor")
    parser.add_argument("--actors", type=int, default=1, help="number of models that run in parallel")
    parser.add_argument("--batch", type=int, default=1024, help="texts per call of the model")
    arguments = parser.parse_args()

    ray.init(
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"py_modules": [str(ROOT / "embedding_service")]},
    )
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column=arguments.id,
        checkpoint_path=f"{arguments.output.rstrip('/')}.done",
        delete_checkpoint_on_success=False,
    )
    settings = Config(
        embedding_model=arguments.model,
        device=arguments.device,
        cpu_fallback=False,
        max_queued_tokens=1 << 40,
        cache_folder="",
    )
    corpus = ray.data.read_parquet(arguments.input)
    # If a run is killed, it loses the blocks in progress, so a block is only one batch.
    corpus.repartition(target_num_rows_per_block=arguments.batch).map_batches(
        Embed,
        fn_constructor_args=(settings, arguments.text),
        batch_size=arguments.batch,
        compute=ray.data.ActorPoolStrategy(size=arguments.actors),
        num_gpus=1 if arguments.device.startswith("cuda") else 0,
        # Otherwise, on a small machine, Ray's own tasks would wait forever for a CPU that an actor holds.
        num_cpus=0,
        scheduling_strategy="SPREAD",
    ).write_parquet(arguments.output)


if __name__ == "__main__":
    main()
