"""The fingerprint differs if `SentenceTransformer.encode` gives other vectors, and only then."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from embedding_service.inference.checkpoint import DTYPES
from embedding_service.inference.fingerprint import fingerprint
from tests.inference.tiny_models import SENTENCE

TEXTS = [SENTENCE, "The quick Brown fox", "river", "query that passage, model vector"]
SETTINGS = {"dtype": "float32", "max_seq_length": 256, "prompts": {}, "default_prompt_name": None}


def vectors(folder: Path, *, dtype, max_seq_length, prompts, default_prompt_name) -> np.ndarray:
    """What sentence-transformers gives with the same settings."""
    model = SentenceTransformer(
        str(folder),
        device="cpu",
        prompts=prompts or None,
        default_prompt_name=default_prompt_name,
        model_kwargs={"dtype": DTYPES[dtype]},
    ).to(DTYPES[dtype])
    if isinstance(model[0], Transformer):
        model.max_seq_length = min(model.max_seq_length, max_seq_length)
    return model.encode(TEXTS, convert_to_tensor=True).float().numpy()


def configure(name: str, **facts) -> Callable[[Path], None]:
    """Set keys of a JSON file; `None` removes one."""

    def change(folder: Path) -> None:
        path = folder / name
        config = {**json.loads(path.read_text()), **facts}
        removed = {key for key, value in facts.items() if value is None}
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in removed}))

    return change


def in_tokenizer(*keys: str | int, value) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        *way, last = keys
        place = content
        for key in way:
            place = place[key]
        place[last] = value(place[last]) if callable(value) else value
        path.write_text(json.dumps(content))

    return change


def weights(name: str, tensor: str, factor: float = 1.5) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        tensors[tensor] = tensors[tensor] * factor
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return change


def pickled(folder: Path) -> None:
    """The Dense module's weights as a .bin file."""
    path = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def other_pickle(folder: Path) -> None:
    path = folder / "2_Dense" / "pytorch_model.bin"
    torch.save({name: tensor * 1.5 for name, tensor in torch.load(path).items()}, path)


def in_parts(folder: Path) -> None:
    """The transformer's weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / part, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: part for part, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def modules(edit: Callable[[list[dict]], list[dict]]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "modules.json"
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))

    return change


def without(number: int) -> Callable[[Path], None]:
    return modules(lambda found: [one for one in found if one["idx"] != number])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


def rename_dense(folder: Path) -> None:
    (folder / "2_Dense").rename(folder / "2_Projection")
    modules(lambda found: [{**one, "path": one["path"].replace("Dense", "Projection")} for one in found])(
        folder
    )


def older_names(folder: Path) -> None:
    modules(
        lambda found: [
            {**one, "type": f"sentence_transformers.models.{one['type'].rpartition('.')[2]}"} for one in found
        ]
    )(folder)


def plain(folder: Path) -> None:
    """The transformer alone, as `transformers` saves it."""
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()


def prompted(folder: Path) -> None:
    prompts = {"query": "the query: ", "passage": "passage of: "}
    of_model(prompts=prompts, default_prompt_name="query")(folder)


def swap(vocabulary: dict[str, int]) -> dict[str, int]:
    return {**vocabulary, "river": vocabulary["fox"], "fox": vocabulary["river"]}


CONFIG = partial(configure, "config.json")
of_model = partial(configure, "config_sentence_transformers.json")
SBERT = partial(configure, "sentence_bert_config.json")
WORDS = partial(configure, "tokenizer_config.json")

UNCHANGED: Callable[[Path], None] = lambda _folder: None  # noqa: E731
Row = tuple[Callable[[Path], object], Callable[[Path], object] | dict]

# What is changed first, and then the one fact: in the folder, or in the settings.
OTHER_VECTORS: dict[str, Row] = {
    "weights of the transformer": (UNCHANGED, weights("model.safetensors", "embeddings.LayerNorm.weight")),
    "a bias of the transformer": (
        UNCHANGED,
        weights("model.safetensors", "encoder.layer.1.output.dense.weight"),
    ),
    "weights of a Dense module": (UNCHANGED, weights("2_Dense/model.safetensors", "linear.weight")),
    "weights of a Dense module in .bin": (pickled, other_pickle),
    "weights in parts": (
        in_parts,
        weights("model-00002-of-00002.safetensors", "encoder.layer.1.output.dense.weight"),
    ),
    "activation of Dense": (
        UNCHANGED,
        configure("2_Dense/config.json", activation_function="torch.nn.modules.linear.Identity"),
    ),
    "no Dense": (UNCHANGED, without(2)),
    "no Normalize": (UNCHANGED, without(3)),
    "no modules.json": (UNCHANGED, plain),
    "architecture that means the last token": (plain, CONFIG(architectures=["BertForCausalLM"])),
    "pooling mode": (UNCHANGED, configure("1_Pooling/config.json", pooling_mode="cls")),
    "prompt left out of pooling": (prompted, configure("1_Pooling/config.json", include_prompt=False)),
    "hidden_act": (UNCHANGED, CONFIG(hidden_act="relu")),
    "layer_norm_eps": (UNCHANGED, CONFIG(layer_norm_eps=0.5)),
    "number of heads": (UNCHANGED, CONFIG(num_attention_heads=2)),
    "number of layers": (UNCHANGED, CONFIG(num_hidden_layers=1)),
    "is_decoder": (UNCHANGED, CONFIG(is_decoder=True)),
    "do_lower_case": (
        in_tokenizer("normalizer", "lowercase", value=False),
        SBERT(do_lower_case=True),
    ),
    "max_seq_length of the model": (UNCHANGED, SBERT(max_seq_length=6)),
    "model_max_length of the tokenizer": (UNCHANGED, WORDS(model_max_length=6)),
    "max_position_embeddings with no other limit": (
        WORDS(model_max_length=None),
        lambda folder: (
            CONFIG(max_position_embeddings=12)(folder),
            weights_cut(folder, "embeddings.position_embeddings.weight", 12),
        ),
    ),
    "padding side": (UNCHANGED, WORDS(padding_side="left")),
    "truncation side": (SBERT(max_seq_length=6), WORDS(truncation_side="left")),
    "post-processor without [SEP]": (
        UNCHANGED,
        in_tokenizer("post_processor", "single", value=lambda single: single[:2]),
    ),
    "order of the vocabulary": (UNCHANGED, in_tokenizer("model", "vocab", value=swap)),
    "normalizer": (UNCHANGED, in_tokenizer("normalizer", "lowercase", value=False)),
    "pre-tokenizer": (UNCHANGED, in_tokenizer("pre_tokenizer", value={"type": "WhitespaceSplit"})),
    "truncate_dim": (UNCHANGED, of_model(truncate_dim=8)),
    "another truncate_dim": (of_model(truncate_dim=8), of_model(truncate_dim=7)),
    "default prompt": (UNCHANGED, prompted),
    "another default prompt": (prompted, of_model(default_prompt_name="passage")),
    "text of the default prompt": (
        prompted,
        of_model(prompts={"query": "that: ", "passage": "passage of: "}),
    ),
    "MAX_SEQ_LENGTH": (UNCHANGED, {"max_seq_length": 6}),
    "DEFAULT_PROMPT_NAME": (prompted, {"default_prompt_name": "passage"}),
    "PROMPTS": (prompted, {"prompts": {"query": "a vector: "}}),
    "DTYPE": (UNCHANGED, {"dtype": "bfloat16"}),
}

SAME_VECTORS: dict[str, Row] = {
    "README": (UNCHANGED, write("README.md", "# Another model")),
    "time of a file": (UNCHANGED, lambda folder: os.utime(folder / "model.safetensors", (0, 0))),
    "name of a folder": (UNCHANGED, rename_dense),
    "names of modules": (
        UNCHANGED,
        modules(lambda found: [{**one, "name": f"m{one['idx']}"} for one in found]),
    ),
    "where the library keeps its modules": (UNCHANGED, older_names),
    "versions": (UNCHANGED, of_model(__version__={"sentence_transformers": "2.0.0"})),
    "similarity function": (UNCHANGED, of_model(similarity_fn_name="dot")),
    "empty prompts": (UNCHANGED, of_model(prompts={})),
    "empty default prompt": (UNCHANGED, of_model(default_prompt_name="query")),
    "name of the model": (UNCHANGED, CONFIG(_name_or_path="another/model", transformers_version="4.0.0")),
    "number format of the files": (UNCHANGED, CONFIG(dtype="float16")),
    "labels and dropout": (UNCHANGED, CONFIG(id2label={"0": "no"}, hidden_dropout_prob=0.5)),
    "architecture beside modules.json": (UNCHANGED, CONFIG(architectures=["BertForCausalLM"])),
    "order and space in a configuration": (
        UNCHANGED,
        lambda folder: (folder / "config.json").write_text(
            json.dumps(dict(reversed(json.loads((folder / "config.json").read_text()).items())), indent=7)
        ),
    ),
    "another export": (UNCHANGED, write("onnx/model.onnx", "graph")),
    "what training leaves": (UNCHANGED, write("training_args.bin", "no weights")),
    "weights that are not read": (UNCHANGED, write("pytorch_model.bin", "no weights")),
    "vocabulary that is not read": (UNCHANGED, write("vocab.txt", "[PAD]\nanother")),
    "settings without modules.json": (
        plain,
        write("config_sentence_transformers.json", '{"truncate_dim": 8, "prompts": {"query": "q: "}}'),
    ),
    "MAX_SEQ_LENGTH above the model's own": (UNCHANGED, {"max_seq_length": 512}),
    "PROMPTS as in the model": (prompted, {"prompts": {"query": "the query: "}}),
}


def weights_cut(folder: Path, tensor: str, rows: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor] = tensors[tensor][:rows].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def before_and_after(row: Row, folder: Path, tmp_path: Path) -> list[tuple[str, np.ndarray]]:
    prepare, fact = row
    pairs = []
    for number, apply in enumerate((False, True)):
        copy = tmp_path / str(number) / "model"
        shutil.copytree(folder, copy)
        prepare(copy)
        settings = dict(SETTINGS)
        if apply and not isinstance(fact, dict):
            fact(copy)
        elif apply:
            settings |= fact
        pairs.append((fingerprint(copy, **settings), vectors(copy, **settings)))
    return pairs


@pytest.mark.parametrize("name", OTHER_VECTORS)
def test_other_vectors_have_another_fingerprint(name, tiny, tmp_path):
    (before, old), (after, new) = before_and_after(OTHER_VECTORS[name], tiny("dense"), tmp_path)
    assert old.shape != new.shape or np.abs(old - new).max() > 1e-4
    assert before != after


@pytest.mark.parametrize("name", SAME_VECTORS)
def test_the_same_vectors_have_the_same_fingerprint(name, tiny, tmp_path):
    (before, old), (after, new) = before_and_after(SAME_VECTORS[name], tiny("dense"), tmp_path)
    np.testing.assert_array_equal(old, new)
    assert before == after


@pytest.mark.parametrize("route", ["static", "query", "document"])
def test_the_weights_within_other_models_count(route, tiny, tmp_path):
    folder, task = tmp_path / "model", {} if route == "static" else {"task": route}
    shutil.copytree(tiny("routed" if task else "static"), folder)
    before = fingerprint(folder, **SETTINGS)
    old = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, **task)
    path = next(folder.glob(f"**/{route}_*/model.safetensors"), folder / "model.safetensors")
    tensors = {name: tensor.flip(-1).contiguous() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    new = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, **task)
    assert np.abs(new - old).max() > 1e-4
    assert fingerprint(folder, **SETTINGS) != before


def test_a_static_model_reads_whole_texts_whatever_max_seq_length_says(tiny):
    short = {**SETTINGS, "max_seq_length": 2}
    assert fingerprint(tiny("static"), **short) == fingerprint(tiny("static"), **SETTINGS)


def test_a_fingerprint_needs_neither_torch_nor_the_libraries_of_the_model(tiny):
    code = (
        "import sys; from pathlib import Path\n"
        "from embedding_service.inference.fingerprint import fingerprint\n"
        f"print(fingerprint(Path({str(tiny('dense'))!r}), **{SETTINGS!r}))\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'sentence_transformers'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fingerprint(tiny("dense"), **SETTINGS)
