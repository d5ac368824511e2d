"""Lets the model answer at once, in a model process that is started with this folder on its PYTHONPATH.

The model is loaded, and texts are tokenised, as ever; only the forward pass gives vectors made beforehand.
"""

import importlib.machinery
import sys

MODULE = "embedding_service.inference.local"


class Finder:
    """Lets the module be found as usual, and wraps how it loads a model."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            load = module._load_model
            module._load_model = lambda settings: instant(load(settings))

        spec.loader.exec_module = execute_and_wrap
        return spec


def instant(runtime):
    """The runtime without its forward pass."""
    import numpy

    made = numpy.random.default_rng(1).standard_normal((16_384, runtime.info.embedding_dimension))
    vectors = (made / numpy.linalg.norm(made, axis=1, keepdims=True)).astype(numpy.float32)

    def forward(batch, *_others, **_named):
        return vectors[: sum(len(part.rows) for part in batch)]

    for lane in (*runtime.lanes, runtime.whole):
        if lane is not None:
            lane.forward = forward
    return runtime


if "embedding_service.sharing.server" in sys.orig_argv:
    sys.meta_path.insert(0, Finder)
