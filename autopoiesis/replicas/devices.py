"""What replicas can run on here: GPUs, or else cores."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    gpus: tuple[int, ...] = ()
    """Indexes of its GPUs; none where it runs on cores."""
    cores: tuple[int, ...] = ()
    """Its cores, where it has no GPU."""


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


class Berths:
    """The places of running replicas: a restart may ask for more GPUs than the replica had."""

    def __init__(self, first: Mapping[str, Place], found: Sequence[Gpu]) -> None:
        """`first` is where each replica runs first; its GPUs stay its own wherever nobody else has them."""
        self._first = dict(first)
        self._held = {name: place.gpus for name, place in first.items()}
        self._indexes = [gpu.index for gpu in found]
        in_use = [i for gpus in self._held.values() for i in gpus]
        self._shared = len(set(in_use)) < len(in_use)

    def take(self, name: str, gpus_each: int) -> Place:
        """Return where a replica that spans so many GPUs can run, and hold that for it.

        Raises:
            PlacementError: too few GPUs are free.
        """
        first = self._first[name]
        if not self._indexes:
            if gpus_each > 1:
                raise PlacementError(
                    f"A tensor-parallel size of {gpus_each} needs GPUs, and none are here."
                )
            return first
        if self._shared and gpus_each == 1:
            self._held[name] = first.gpus
            return first
        others = {i for other, gpus in self._held.items() if other != name for i in gpus}
        own = [i for i in first.gpus if i not in others]
        free = own + [i for i in self._indexes if i not in others and i not in own]
        if len(free) < gpus_each:
            raise PlacementError(
                f"{name} would need {gpus_each} GPUs, and {len(free)} are free; stop another replica first."
            )
        self._held[name] = tuple(sorted(free[:gpus_each]))
        return _on_gpus(self._held[name])

    def leave(self, name: str) -> None:
        """Let others have a stopped replica's GPUs."""
        self._held[name] = ()


def usable_cores() -> list[int]:
    """Return the cores that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _on_gpus(indexes: Sequence[int]) -> Place:
    listed = ",".join(map(str, indexes))
    return Place(f"GPU {listed}", {"CUDA_VISIBLE_DEVICES": listed}, tuple(indexes))


def _on_cores(cores: Sequence[int]) -> Place:
    """Bind a replica's threads: left alone, every vLLM on a CPU binds itself to core 0.

    Its processes are to be started there as well: Intel's OpenMP, when it is loaded, moves itself to each core
    that it may use, and behind the busy threads of another replica it has been seen to wait for minutes.
    """
    listed = ",".join(map(str, cores))
    return Place(f"core {listed}", {"VLLM_CPU_OMP_THREADS_BIND": listed}, cores=tuple(cores))


def _split(cores: Sequence[int], replicas: int, ranks_each: int) -> list[Sequence[int]]:
    if ranks_each > 1:
        raise PlacementError(
            f"A tensor-parallel size of {ranks_each} needs GPUs, and none are here; leave it out."
        )
    if replicas >= len(cores):
        return [[cores[i % len(cores)]] for i in range(replicas)]
    each = len(cores) // replicas
    return [cores[i * each : (i + 1) * each] for i in range(replicas)]
