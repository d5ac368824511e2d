"""Faults for a model process that is started with this folder on its PYTHONPATH, asked for by words in texts.

@@oom@@ runs out of memory in every batch of more than one text, @@poison@@ raises, @@nan@@ gives a vector
of NaN unless it is computed alone, @@nan-always@@ also then, @@sticky@@ loses the device, @@slow@@ takes six
seconds, @@hang@@ never returns, @@freeze@@ never returns and keeps the interpreter's lock.
FAULTS_SEEN names a file that gets a line for each text with a word in it that reaches the model.
"""

import ctypes
import importlib.machinery
import os
import sys
import threading
import time
from pathlib import Path

MODULE = "embedding_service.inference.loading"


class Finder:
    """Lets the module be found as usual, and spoils whatever its `load` returns."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_spoil(module):
            execute(module)
            load = module.load
            module.load = lambda settings: spoil(load(settings))

        spec.loader.exec_module = execute_and_spoil
        return spec


class Words:
    """The texts with a word in them, by the Prepared that holds them; kept, so that no id comes twice."""

    def __init__(self):
        self._kept = {}
        # Of the batch that a thread runs: what a fault inside the model goes by.
        self.of_thread = threading.local()

    def remember(self, prepared, texts):
        if any("@@" in text for text in texts):
            self._kept[id(prepared)] = (prepared, list(texts))

    def of(self, batch):
        """The text of each row of a batch, empty for those without a word."""
        found = []
        for part in batch:
            _, texts = self._kept.get(id(part.texts), (None, None))
            found += [texts[row] if texts and "@@" in texts[row] else "" for row in part.rows]
        return found


def spoil(runtime):
    """A runtime that does what the words in its texts say."""
    words = Words()
    prepare, exact = runtime.prepare, runtime.forward_exact

    def prepare_and_remember(texts, *others, **named):
        prepared = prepare(texts, *others, **named)
        words.remember(prepared, texts)
        return prepared

    def spoiled_exact(one):
        words.of_thread.texts = []
        vectors = exact(one)
        return vectors * float("nan") if "@@nan-always@@" in words.of([one])[0] else vectors

    runtime.prepare, runtime.forward_exact = prepare_and_remember, spoiled_exact
    for lane in [*runtime.lanes, *([runtime.whole] if runtime.whole else [])]:
        spoil_lane(lane, words)
    spoil_model(words)
    return runtime


def spoil_lane(lane, words):
    forward = lane.forward

    def spoiled_forward(batch):
        texts = words.of_thread.texts = words.of(batch)
        note([text for text in texts if text])
        vectors = forward(batch)
        for row, text in enumerate(texts):
            if "@@nan" in text:
                vectors = vectors.copy()
                vectors[row, 0] = float("nan")
        return vectors

    lane.forward = spoiled_forward


def spoil_model(words):
    """Faults that the backend must see are raised inside the model that it runs."""
    import torch
    from sentence_transformers import SentenceTransformer

    forward = SentenceTransformer.forward

    def spoiled_forward(self, *arguments, **named):
        texts = getattr(words.of_thread, "texts", [])
        every = " ".join(texts)
        if "@@oom@@" in every and len(texts) > 1:
            raise torch.OutOfMemoryError("injected: CUDA out of memory")
        if "@@poison@@" in every:
            raise RuntimeError("injected: a text the model cannot take")
        if "@@sticky@@" in every:
            raise torch.AcceleratorError("injected: an illegal memory access was encountered")
        if "@@slow@@" in every:
            time.sleep(6)
        if "@@hang@@" in every:
            time.sleep(3600)
        if "@@freeze@@" in every:
            ctypes.PyDLL(None).sleep(3600)
        return forward(self, *arguments, **named)

    SentenceTransformer.forward = spoiled_forward


def note(texts):
    if texts and os.environ.get("FAULTS_SEEN"):
        with Path(os.environ["FAULTS_SEEN"]).open("a", encoding="utf-8") as seen:
            seen.writelines(f"{text}\n" for text in texts)


if "embedding_service.sharing.server" in sys.orig_argv:
    sys.meta_path.insert(0, Finder)
