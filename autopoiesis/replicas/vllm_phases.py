"""What the parts of a vLLM start took, by its log."""

import re
from typing import NamedTuple

_LOADED = re.compile(r"Model loading took .*? ([\d.]+) seconds")
_WEIGHTS = re.compile(r"Loading weights took ([\d.]+) seconds")
_COMPILED = re.compile(r"torch\.compile (?:took|takes) ([\d.]+) s in total")
_CAPTURED = re.compile(r"Graph capturing finished in ([\d.]+) secs")
_ENGINE = re.compile(r"init engine \(.*?\) took ([\d.]+) s")


class Phases(NamedTuple):
    """Parts of a start [s]; 0 for what the log does not tell. What they leave of the whole is processes and imports."""

    load_s: float
    """The model's weights."""
    compile_s: float
    capture_s: float
    """CUDA graphs."""
    engine_s: float
    """Profiling, the KV cache, warming up: the engine's start without what stands above."""

    @property
    def seconds(self) -> float:
        """Return their sum."""
        return sum(self)


def phases(log: str) -> Phases:
    """Read the phases of one start. Ranks of a tensor-parallel replica work at the same time: the slowest counts."""
    load_s = _longest(_LOADED, log) or _longest(_WEIGHTS, log)
    compile_s, capture_s = _longest(_COMPILED, log), _longest(_CAPTURED, log)
    engine_s = max(_longest(_ENGINE, log) - compile_s - capture_s, 0.0)
    return Phases(load_s, compile_s, capture_s, engine_s)


def _longest(pattern: re.Pattern[str], log: str) -> float:
    return max((float(found) for found in pattern.findall(log)), default=0.0)
