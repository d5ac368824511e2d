"""The engine uses as many cores as the container or service manager allows."""

from pathlib import Path

import pytest

from embedding_service.inference import cores
from embedding_service.inference.cores import available_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)))


def tree(root: Path, cgroup: str, **files: str) -> Path:
    """A root folder with this /proc/self/cgroup and these files below /sys/fs/cgroup."""
    given = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in (given | {"proc/self/cgroup": cgroup}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [
        pytest.param("100000 100000", 1, id="one core"),
        pytest.param("150000 100000", 2, id="one and a half"),
        pytest.param("20000 100000", 1, id="a fifth"),
        pytest.param("max 100000", 8, id="no limit"),
        pytest.param("6400000 100000", 8, id="more than the machine has"),
        pytest.param("nonsense", 8, id="nonsense"),
        pytest.param("1 0", 8, id="a period of 0"),
    ],
)
def test_a_quota_counts(tmp_path, cpu_max, expected):
    assert available_cores(tree(tmp_path, "0::/\n", **{"cpu.max": cpu_max})) == expected


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param(
            "0::/system.slice/embedding.service\n",
            {"system.slice/embedding.service/cpu.max": "300000 100000"},
            3,
            id="systemd's CPUQuota=300%",
        ),
        pytest.param(
            "0::/a/b/c\n",
            {"a/b/c/cpu.max": "max 100000", "a/b/cpu.max": "500000 100000", "a/cpu.max": "200000 100000"},
            2,
            id="the smallest of nested groups",
        ),
        pytest.param(
            "0::/kubepods/pod1/here\n",
            {"kubepods/other/cpu.max": "100000 100000", "kubepods/pod1/here/cpu.max": "400000 100000"},
            4,
            id="not a neighbouring group",
        ),
        pytest.param("0::/../../a\n", {"a/cpu.max": "200000 100000"}, 2, id="outside of the namespace"),
        pytest.param(
            "12:cpuset:/x\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/x\n",
            v1("cpu,cpuacct/docker/1", 250_000),
            3,
            id="version 1",
        ),
        pytest.param("4:cpu,cpuacct:/docker/1\n", v1("cpu,cpuacct", 250_000), 3, id="its container"),
        pytest.param("4:cpuacct,cpu:/x\n", v1("cpu/x", 100_000, 50_000), 2, id="version 1 by its link"),
        pytest.param("4:cpu:/x\n", v1("cpu/x", -1) | v1("cpu", 600_000), 6, id="version 1, -1 is no limit"),
        pytest.param(
            "4:cpu,cpuacct:/a\n0::/b\n",
            v1("cpu,cpuacct/a", 300_000) | {"unified/b/cgroup.procs": ""},
            3,
            id="both versions mounted",
        ),
    ],
)
def test_the_smallest_quota_of_every_group_above_counts(tmp_path, cgroup, files, expected):
    assert available_cores(tree(tmp_path, cgroup, **files)) == expected


def test_without_cgroups_the_affinity_counts(tmp_path):
    assert available_cores(tmp_path / "missing") == 8


def test_taskset_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {3, 5})
    assert available_cores(tree(tmp_path, "0::/\n", **{"cpu.max": "400000 100000"})) == 2


def test_the_machine_that_this_runs_on_has_cores():
    assert 1 <= available_cores() <= 8
