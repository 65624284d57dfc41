import os
from pathlib import Path

import pytest

from autopoiesis.replicas.devices import Gpu, PlacementError, gpus, places

TWO_GPUS = [Gpu(i, "NVIDIA H100 80GB HBM3", 81559, 4) for i in range(2)]


def whats(*arguments):
    return [place.what for place in places(*arguments)]


def test_each_replica_has_a_gpu_of_its_own():
    assert ["GPU 0", "GPU 1"] == whats(2, 1, TWO_GPUS, [0, 1])


def test_replicas_share_gpus_where_there_are_too_few():
    assert ["GPU 0", "GPU 1", "GPU 0"] == whats(3, 1, TWO_GPUS, [0, 1])


def test_a_tensor_parallel_replica_has_several():
    assert [{"CUDA_VISIBLE_DEVICES": "0,1"}] == [p.environment for p in places(1, 2, TWO_GPUS, [0])]


def test_too_few_gpus_for_tensor_parallel_replicas():
    with pytest.raises(PlacementError, match="2 replicas of 2 GPUs need 4, and there are 2"):
        places(2, 2, TWO_GPUS, [0, 1])


@pytest.mark.parametrize(
    ("replicas", "cores", "expected"),
    [
        (2, [0, 1], ["0", "1"]),
        (2, [0, 1, 2, 3, 4], ["0,1", "2,3"]),
        (1, [4, 7], ["4,7"]),
        (3, [0, 1], ["0", "1", "0"]),
    ],
)
def test_without_gpus_replicas_are_bound_to_cores(replicas, cores, expected):
    placed = places(replicas, 1, [], cores)
    assert [p.environment["VLLM_CPU_OMP_THREADS_BIND"] for p in placed] == expected
    assert [",".join(map(str, p.cores)) for p in placed] == expected


def test_tensor_parallelism_needs_gpus():
    with pytest.raises(PlacementError, match="needs GPUs, and none are here"):
        places(1, 2, [], [0, 1])


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put an `nvidia-smi` of that body first on the path."""

    def put(body: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def test_the_driver_lists_its_gpus(driver):
    driver(
        "echo '0, NVIDIA H100 80GB HBM3, 81559, 4'; echo '1, NVIDIA H100 80GB HBM3, 81559, 70001'"
    )
    assert (TWO_GPUS[0], Gpu(1, "NVIDIA H100 80GB HBM3", 81559, 70001)) == gpus()


def test_a_driver_that_fails_is_told(driver):
    driver("echo 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9")
    with pytest.raises(PlacementError, match="could not communicate with the driver"):
        gpus()


def test_no_driver_means_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert () == gpus()
