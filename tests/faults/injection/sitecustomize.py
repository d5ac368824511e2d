"""Faults in a model process started with this folder on its PYTHONPATH, triggered by words in texts.

@@oom@@ runs out of memory in every batch of more than one text, @@poison@@ raises, @@nan@@ gives a vector
of NaN unless it is computed alone, @@nan-always@@ also then, @@sticky@@ loses the device, @@sticky-once@@
loses the device of the process that first computes it, which a file beside FAULTS_SEEN remembers.
"""

import os
import sys
import threading
from pathlib import Path


class Words:
    """The texts that contain a word, by the id of their arrays, which are kept so that no id is reused."""

    def __init__(self):
        self._kept = {}
        # The texts of the batch that each thread runs, which decide on faults inside the model.
        self.of_thread = threading.local()

    def remember(self, prepared, texts):
        if any("@@" in text for text in texts):
            self._kept[id(prepared)] = (prepared, list(texts))

    def of(self, batch):
        """The text of each row of a batch, empty if it contains no word."""
        found = []
        for part in batch:
            _, texts = self._kept.get(id(part.tokenized), (None, None))
            found += [texts[row] if texts and "@@" in texts[row] else "" for row in part.rows]
        return found


def inject(model):
    """Make a model fail as the words in its texts say."""
    words = Words()
    prepare, exact = model.preprocessor.prepare, model.exact.forward

    def prepare_and_remember(texts, *others, **named):
        prepared = prepare(texts, *others, **named)
        words.remember(prepared, texts)
        return prepared

    def faulty_exact(one):
        words.of_thread.texts = []
        vectors = exact(one)
        return vectors * float("nan") if "@@nan-always@@" in words.of([one])[0] else vectors

    model.preprocessor.prepare, model.exact.forward = prepare_and_remember, faulty_exact
    for stream in [*model.streams, *([model.all_cores] if model.all_cores else [])]:
        inject_into_stream(stream, words)
    inject_into_model(words)
    return model


def inject_into_stream(stream, words):
    forward = stream.forward

    def faulty_forward(batch):
        texts = words.of_thread.texts = words.of(batch)
        vectors = forward(batch)
        for row, text in enumerate(texts):
            if "@@nan" in text:
                vectors = vectors.copy()
                vectors[row, 0] = float("nan")
        return vectors

    stream.forward = faulty_forward


def inject_into_model(words):
    """Raise the faults that the backend must handle inside the model."""
    import torch
    from sentence_transformers import SentenceTransformer

    forward = SentenceTransformer.forward

    def faulty_forward(self, *arguments, **named):
        texts = getattr(words.of_thread, "texts", [])
        every = " ".join(texts)
        if "@@oom@@" in every and len(texts) > 1:
            raise torch.OutOfMemoryError("injected: CUDA out of memory")
        if "@@poison@@" in every:
            raise RuntimeError("injected: a text the model cannot take")
        if "@@sticky@@" in every:
            raise torch.AcceleratorError("injected: an illegal memory access was encountered")
        if "@@sticky-once@@" in every and lose_once():
            raise torch.AcceleratorError("injected: an illegal memory access was encountered")
        return forward(self, *arguments, **named)

    SentenceTransformer.forward = faulty_forward


def lose_once():
    """Whether this is the first process that asks."""
    try:
        Path(f"{os.environ['FAULTS_SEEN']}.lost").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if "embedding_service.sharing.server" in sys.orig_argv:
    from embedding_service.inference import local

    load = local._load_model
    local._load_model = lambda settings: inject(load(settings))
