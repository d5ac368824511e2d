"""Skips the forward pass in a model process that is started with this folder on its PYTHONPATH.

The model is loaded and texts are tokenized as usual, but the forward pass returns prepared vectors at once.
"""

import sys


def instant(runtime):
    """Replace the forward pass of the runtime."""
    import numpy

    made = numpy.random.default_rng(1).standard_normal((16_384, runtime.info.embedding_dimension))
    vectors = (made / numpy.linalg.norm(made, axis=1, keepdims=True)).astype(numpy.float32)

    def forward(batch, *_others, **_named):
        return vectors[: sum(len(part.rows) for part in batch)]

    for stream in (*runtime.streams, runtime.all_cores):
        if stream is not None:
            stream.forward = forward
    return runtime


if "embedding_service.sharing.server" in sys.orig_argv:
    from embedding_service.inference import local

    load = local._load_model
    local._load_model = lambda settings: instant(load(settings))
