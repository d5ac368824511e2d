"""A model's own lists say which files it needs; what is no model for dense vectors gets one line."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from embedding_service.errors import StartupError
from embedding_service.inference import model_files, source

ST = "sentence_transformers"
TRANSFORMER = {"type": f"{ST}.models.Transformer", "path": ""}
WEIGHTS = "model.safetensors"


def make(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def typed(*kinds: str) -> list[dict]:
    return [TRANSFORMER, *({"type": kind, "path": f"{n}_Own"} for n, kind in enumerate(kinds, 1))]


PLAIN: dict[str, object] = {"config.json": {}, WEIGHTS: ""}
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "cross-encoder as saved today": (
        {
            "modules.json": typed(),
            "config_sentence_transformers.json": {"model_type": "CrossEncoder"},
            "config.json": {},
            WEIGHTS: "",
        },
        "is a CrossEncoder, .* serves it at /rerank",
    ),
    "cross-encoder as saved before": (
        {"config.json": {"architectures": ["BertForSequenceClassification"]}, WEIGHTS: ""},
        "is a CrossEncoder",
    ),
    "cross-encoder by its task": (
        {
            "modules.json": typed(),
            "sentence_bert_config.json": {"transformer_task": "sequence-classification"},
            **PLAIN,
        },
        "is a CrossEncoder",
    ),
    "sparse encoder": (
        {
            "modules.json": typed(),
            "config_sentence_transformers.json": {"model_type": "SparseEncoder"},
            **PLAIN,
        },
        "is a SparseEncoder, .* serves it at /embed_sparse",
    ),
    "sparse encoder by its modules": (
        {"modules.json": typed(f"{ST}.sparse_encoder.models.SpladePooling"), **PLAIN},
        "is a SparseEncoder",
    ),
    "multi-vector encoder": (
        {
            "modules.json": typed(),
            "config_sentence_transformers.json": {"model_type": "MultiVectorEncoder"},
            **PLAIN,
        },
        "is a MultiVectorEncoder",
    ),
    "code of its own": (
        {"modules.json": [{"type": "custom_st.Transformer", "path": ""}], **PLAIN},
        r"needs code of its own \(custom_st.Transformer\), which this service never runs$",
    ),
    "no weights": ({"config.json": {}, "tf_model.h5": ""}, "has no weights: neither model.safetensors nor"),
    "Dense without weights": (
        {"modules.json": typed(f"{ST}.models.Dense"), "1_Own/config.json": {}, **PLAIN},
        "has no weights: neither 1_Own/model.safetensors nor 1_Own/pytorch_model.bin",
    ),
    "a part of the weights is missing": (
        {
            "config.json": {},
            f"{WEIGHTS}.index.json": {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}},
            "model-1.safetensors": "",
        },
        "is incomplete: it lacks model-2.safetensors",
    ),
    "broken JSON": ({"modules.json": "[", **PLAIN}, "has a modules.json that cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_gets_one_line(case, tmp_path):
    files, words = REFUSED[case]
    with pytest.raises(StartupError, match=words) as caught:
        source.check(str(make(tmp_path, files)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


READ: dict[str, tuple[dict[str, object], list[str]]] = {
    "weights in parts": (
        {
            f"{WEIGHTS}.index.json": {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}},
            "model-1.safetensors": "",
            "model-2.safetensors": "",
            "model-3.safetensors": "",
        },
        [f"{WEIGHTS}.index.json", "model-1.safetensors", "model-2.safetensors"],
    ),
    "a pickle only if nothing else is there": ({WEIGHTS: "", "pytorch_model.bin": ""}, [WEIGHTS]),
    "a pickle": ({"pytorch_model.bin": "", "tf_model.h5": ""}, ["pytorch_model.bin"]),
    "a vocabulary that nothing replaces": (
        {WEIGHTS: "", "vocab.txt": "", "bpe.codes": ""},
        [WEIGHTS, "vocab.txt", "bpe.codes"],
    ),
    "a vocabulary that tokenizer.json replaces": (
        {
            WEIGHTS: "",
            "tokenizer.json": {},
            "tokenizer_config.json": {"tokenizer_class": "BertTokenizerFast", "added_tokens_decoder": {}},
            "vocab.txt": "",
            "special_tokens_map.json": {},
        },
        [WEIGHTS, "tokenizer.json", "tokenizer_config.json"],
    ),
    "a vocabulary beside tokenizer.json": (
        {
            WEIGHTS: "",
            "tokenizer.json": {},
            "tokenizer_config.json": {"tokenizer_class": "PhobertTokenizer"},
            "vocab.txt": "",
            "bpe.codes": "",
        },
        [WEIGHTS, "tokenizer.json", "tokenizer_config.json", "vocab.txt", "bpe.codes"],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_the_files_that_a_load_reads(case, tmp_path):
    files, expected = READ[case]
    make(
        tmp_path,
        {"config.json": {}, "README.md": "", "training_args.bin": "", "onnx/model.onnx": "", **files},
    )
    assert model_files.names_read(model_files.Listing.of(tmp_path)) == ["config.json", *expected]


def test_the_files_of_modules_are_read(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("routed"), folder)
    assert set(model_files.names_read(model_files.Listing.of(folder))) == {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"
    }


def test_the_tokenizers_that_read_one_file_are_those_of_the_tokenizers_library():
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    for name in sorted(model_files.READ_ONE_FILE - {"TokenizersBackend", "PreTrained"}):
        assert issubclass(getattr(transformers, f"{name}Tokenizer"), TokenizersBackend), name
