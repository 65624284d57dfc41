"""What replicas can run on here: GPUs, or else cores."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass


class PlacementError(RuntimeError):
    """The replicas do not fit on this machine; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its driver describes it."""

    index: int
    name: str
    memory_mib: int
    used_mib: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where one replica runs."""

    what: str
    """For people: `GPU 0`, `cores 0,1`."""
    environment: dict[str, str]
    """Variables that keep vLLM there."""


def gpus() -> tuple[Gpu, ...]:
    """Ask the NVIDIA driver for its GPUs; none where there is no driver.

    Raises:
        PlacementError: the driver is there and does not answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [
        tool,
        "--query-gpu=index,name,memory.total,memory.used",
        "--format=csv,noheader,nounits",
    ]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stdout", "") or getattr(error, "stderr", "") or str(error)
        first = str(reason).strip().splitlines()[0]
        raise PlacementError(f"The NVIDIA driver does not answer ({first}); check it.") from None
    return tuple(_gpu(line) for line in told.splitlines() if line.strip())


def _gpu(line: str) -> Gpu:
    index, name, memory, used = (part.strip() for part in line.split(","))
    return Gpu(int(index), name, int(memory), int(used))


def places(
    replicas: int, gpus_each: int, found: Sequence[Gpu], cores: Sequence[int]
) -> list[Place]:
    """Spread replicas over the GPUs, `gpus_each` (tensor parallel) apiece; over cores where there are none.

    Several replicas share a GPU only where each needs one alone and there are too few: then each
    must be told its share of the memory (`--gpu-memory-utilization`).

    Raises:
        PlacementError: there are too few GPUs, or too few cores for what is asked.
    """
    if not found:
        return [_on_cores(part) for part in _split(cores, replicas, gpus_each)]
    if gpus_each == 1:
        return [_on_gpus([found[i % len(found)].index]) for i in range(replicas)]
    if replicas * gpus_each > len(found):
        raise PlacementError(
            f"{replicas} replicas of {gpus_each} GPUs need {replicas * gpus_each}, and there are "
            f"{len(found)}; ask for fewer replicas or a smaller --tensor-parallel-size."
        )
    indexes = [gpu.index for gpu in found]
    return [_on_gpus(indexes[i * gpus_each : (i + 1) * gpus_each]) for i in range(replicas)]


def usable_cores() -> list[int]:
    """Return the cores that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _on_gpus(indexes: Sequence[int]) -> Place:
    listed = ",".join(map(str, indexes))
    return Place(f"GPU {listed}", {"CUDA_VISIBLE_DEVICES": listed})


def _on_cores(cores: Sequence[int]) -> Place:
    """Bind a replica's threads: left alone, every vLLM on a CPU binds itself to core 0."""
    listed = ",".join(map(str, cores))
    return Place(f"core {listed}", {"VLLM_CPU_OMP_THREADS_BIND": listed})


def _split(cores: Sequence[int], replicas: int, ranks_each: int) -> list[Sequence[int]]:
    if ranks_each > 1:
        raise PlacementError(
            f"A tensor-parallel size of {ranks_each} needs GPUs, and none are here; leave it out."
        )
    if replicas >= len(cores):
        return [[cores[i % len(cores)]] for i in range(replicas)]
    each = len(cores) // replicas
    return [cores[i * each : (i + 1) * each] for i in range(replicas)]
