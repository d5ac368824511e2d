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

MODULE = "embedding_service.inference.model"


class Finder:
    """Lets the module be found as usual, and spoils it once it is loaded."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_spoil(module):
            execute(module)
            spoil(module.Model)

        spec.loader.exec_module = execute_and_spoil
        return spec


def spoil(model_class):
    import numpy
    import torch
    from sentence_transformers import SentenceTransformer

    batch_of_this_thread = threading.local()
    tokenize, forward, exact = model_class.tokenize, model_class.forward, model_class.forward_exact
    inner = SentenceTransformer.forward

    def tokenize_with_text(self, texts, *others):
        found = tokenize(self, texts, *others)
        for tokens, text in zip(found, texts, strict=True):
            if "@@" in text:
                tokens.text = text
        return found

    def spoiled_forward(self, batch, *others, **named):
        words = [tokens.text for tokens in batch]
        note([word for word in words if word])
        batch_of_this_thread.words = words
        vectors = forward(self, batch, *others, **named)
        for row, word in enumerate(words):
            if "@@nan" in word:
                vectors = vectors.copy()
                vectors[row, 0] = numpy.nan
        return vectors

    def spoiled_exact(self, tokens):
        batch_of_this_thread.words = []
        vectors = exact(self, tokens)
        return vectors * numpy.nan if "@@nan-always@@" in tokens.text else vectors

    def spoiled_inner(self, *arguments, **named):
        words = getattr(batch_of_this_thread, "words", [])
        every = " ".join(words)
        if "@@oom@@" in every and len(words) > 1:
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
        return inner(self, *arguments, **named)

    model_class.tokenize, model_class.forward = tokenize_with_text, spoiled_forward
    model_class.forward_exact = spoiled_exact
    SentenceTransformer.forward = spoiled_inner


def note(texts):
    if texts and os.environ.get("FAULTS_SEEN"):
        with Path(os.environ["FAULTS_SEEN"]).open("a", encoding="utf-8") as seen:
            seen.writelines(f"{text}\n" for text in texts)


if "embedding_service.sharing.server" in sys.orig_argv:
    sys.meta_path.insert(0, Finder)
