"""The cores that the engine uses are those that a container leaves it."""

import os

import pytest

from embedding_service.inference.cores import available_cores

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [
        pytest.param("100000 100000", 1, id="one core"),
        pytest.param("150000 100000", min(2, ALL), id="one and a half"),
        pytest.param("20000 100000", 1, id="a fifth"),
        pytest.param("max 100000", ALL, id="no limit"),
        pytest.param("6400000 100000", ALL, id="more than there are"),
        pytest.param("nonsense", ALL, id="nonsense"),
    ],
)
def test_a_quota_counts(tmp_path, cpu_max, cores):
    path = tmp_path / "cpu.max"
    path.write_text(cpu_max)
    assert available_cores(path) == cores


def test_without_cgroups_the_affinity_counts(tmp_path):
    assert available_cores(tmp_path / "missing") == ALL
