"""What `download` fetches from a hub, and what it says."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.inference import hub
from tests.service import ROOT

pytestmark = pytest.mark.process

DOWNLOAD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from embedding_service.server import cli
sys.exit(cli.main(["download", "some/model"]))
"""


def download(folder, **settings) -> subprocess.CompletedProcess[str]:
    lines = [f"{name}={value}" for name, value in {"HF_HOME": folder / "home", **settings}.items()]
    (folder / ".env").write_text("\n".join(lines))
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )


def test_download_fetches_what_the_model_reads_and_nothing_else(tiny, tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(tiny("dense"), folder)
    dense = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(dense), dense.with_name("pytorch_model.bin"))
    dense.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": "PhobertTokenizer"})
    )
    for name in ("bpe.codes", "vocab.txt", "pytorch_model.bin", "training_args.bin", "data_config.json"):
        (folder / name).write_text(name)
    with hub.serve(folder) as (address, fetched):
        done = download(tmp_path, HF_ENDPOINT=address, HF_HUB_DISABLE_XET=1)
        assert done.returncode == 0, done.stderr
        assert {"2_Dense/pytorch_model.bin", "bpe.codes", "vocab.txt", "model.safetensors"} < set(fetched)
        assert not {"pytorch_model.bin", "training_args.bin", "README.md"} & set(fetched)
        before = list(fetched)
        assert download(tmp_path, HF_ENDPOINT=address, HF_HUB_DISABLE_XET=1).returncode == 0
        assert fetched == before
    snapshot = next((tmp_path / "home").rglob("snapshots/*"))
    (snapshot / "2_Dense" / "pytorch_model.bin").unlink()
    done = download(tmp_path, HF_HUB_OFFLINE=1)
    assert done.returncode == 78
    assert "is not in the cache and the hub did not answer" in done.stderr.splitlines()[-1]


def test_download_refuses_what_cannot_be_served(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    (folder / "model.safetensors").write_text("weights")
    with hub.serve(folder) as (address, fetched):
        done = download(tmp_path, HF_ENDPOINT=address, HF_HUB_DISABLE_XET=1)
    assert (done.returncode, fetched) == (78, ["config.json"])
    assert done.stderr.splitlines()[-1].startswith("EMBEDDING_MODEL='some/model' is a CrossEncoder")
