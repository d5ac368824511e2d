"""A dry run of bundle/prove-gpu.sh: every step, briefly, on the CPU."""

import json
import subprocess

import pytest

from benchmarks.prove_gpu import STEPS
from tests.service import ROOT

pytestmark = [pytest.mark.long, pytest.mark.process]


def test_every_step_of_a_dry_run_ends_well(tmp_path):
    ran = subprocess.run(
        ["sh", str(ROOT / "bundle" / "prove-gpu.sh"), str(tmp_path), "--dry-run"],
        check=False,
        capture_output=True,
        text=True,
    )
    log = (tmp_path / "log.txt").read_text()
    assert ran.returncode == 0, ran.stdout + ran.stderr + log[-8000:]
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name: steps[name]["ended"] for name in STEPS} == dict.fromkeys(STEPS, "done")
    for name in ("bge-base", "Qwen3-0.6B"):
        for processes in (1, 2):
            load = steps[name][f"32 texts of 128 tokens, 64 clients, base64, processes: {processes}"]
            assert load["requests"] > load["errors"]
    assert "NOT REACHED" in ran.stdout or "not measured" in ran.stdout
