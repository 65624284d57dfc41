"""How long one engine step takes: a linear model of what the scheduler already knows.

For one step with N new tokens in n sequences, of which D decode over contexts that sum to C, and
prefill chunks of k_i tokens behind b_i computed ones::

    T = host + host_sequence*n + (weights^p + (token*N)^p)^(1/p) + head + head_sequence*sampling + A
    A = decode + decode_context_token*C + decode_sequence*D                        (decodes only)
    A = mixed + mixed_decode*[D > 0] + mixed_context_token*C + mixed_sequence*D
        + prefill_token*sum(k_i) + prefill_pair*sum(k_i*(b_i + k_i/2))
        + prefill_cached_token*sum(b_i)                                            (with prefill)

k decode steps in a row of the same sequences take k*T + decode_context_token*D*k*(k-1)/2, which is
what lets the twin jump.
"""

import json
import math
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StepModel:
    """Coefficients of the step time; see the module's formula."""

    weights_s: float
    """Reading the weights once [s]."""
    token_s: float
    """Dense layers per token when bound by compute [s]."""
    knee: float
    """p: how sharp the change from memory-bound to compute-bound is; at least 1."""
    head_s: float
    head_sequence_s: float
    host_s: float
    host_sequence_s: float
    decode_s: float
    decode_context_token_s: float
    decode_sequence_s: float
    mixed_s: float
    mixed_decode_s: float
    mixed_context_token_s: float
    mixed_sequence_s: float
    prefill_token_s: float
    prefill_pair_s: float
    prefill_cached_token_s: float

    def __post_init__(self) -> None:
        for name, value in zip(COEFFICIENTS, self.as_array(), strict=True):
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if self.knee < 1.0:
            raise ValueError(f"knee must be at least 1, got {self.knee}")
        if self.weights_s + self.host_s + self.head_s + self.decode_s == 0.0:
            raise ValueError(
                "a step must take time: weights_s, host_s, head_s and decode_s are all 0"
            )

    def as_array(self) -> NDArray[np.float64]:
        """Return the coefficients in the order of `COEFFICIENTS`."""
        return np.array([float(getattr(self, name)) for name in COEFFICIENTS])

    @classmethod
    def from_array(cls, coefficients: NDArray[np.float64]) -> "StepModel":
        """Make the model from coefficients in the order of `COEFFICIENTS`."""
        return cls(**dict(zip(COEFFICIENTS, coefficients.tolist(), strict=True)))


COEFFICIENTS = tuple(field.name for field in fields(StepModel))
"""Names of the coefficients, in the order of the flat array that the kernels take."""

WEIGHTS, TOKEN, KNEE, HEAD, HEAD_SEQUENCE, HOST, HOST_SEQUENCE = range(7)
DECODE, DECODE_CONTEXT, DECODE_SEQUENCE, MIXED, MIXED_DECODE, MIXED_CONTEXT = range(7, 13)
MIXED_SEQUENCE, PREFILL_TOKEN, PREFILL_PAIR, PREFILL_CACHED = range(13, 17)


@dataclass(frozen=True, slots=True)
class ClientOverhead:
    """What the HTTP path adds to engine times, as a client sees them (BLIS's fit to vLLM's server)."""

    request_s: float = 15.6e-3
    """Before the request reaches the engine."""
    end_s: float = 0.8e-3
    """After its last token."""
    token_s: float = 46e-6
    """Per output token."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One engine: a model on a kind of GPU, with its limits and its step model."""

    name: str
    step: StepModel
    kv_blocks: int
    """KV cache [blocks]."""
    max_num_seqs: int
    max_num_batched_tokens: int
    source: str
    """Where the coefficients come from."""
    validated: bool
    """Whether it was checked end to end against a real engine; `check` says how."""
    kv_block_tokens: int = 16
    check: str = ""
    scheduling: Literal["fcfs", "priority"] = "fcfs"
    """The engine's own queue: vLLM's `--scheduling-policy`."""
    client: ClientOverhead = ClientOverhead()

    def __post_init__(self) -> None:
        for name in ("kv_blocks", "max_num_seqs", "max_num_batched_tokens", "kv_block_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{self.name}: {name} must be at least 1, got {value}")
        if self.scheduling not in ("fcfs", "priority"):
            raise ValueError(
                f"{self.name}: scheduling is 'fcfs' or 'priority', got {self.scheduling!r}"
            )

    @property
    def kv_tokens(self) -> int:
        """Return how many tokens the KV cache holds."""
        return self.kv_blocks * self.kv_block_tokens


@cache
def _entries() -> dict[str, dict[str, Any]]:
    text = resources.files("autopoiesis.twin").joinpath("profiles.json").read_text("utf-8")
    return json.loads(text)


def profiles() -> tuple[str, ...]:
    """Return the names of the built-in profiles."""
    return tuple(_entries())


@cache
def profile(name: str) -> Profile:
    """Return a built-in profile, the one in FILE.json, or the roofline of `GPU-MODEL-tpN-PRECISION`.

    A ValueError says what is wrong, and which there are.
    """
    if name.endswith(".json"):
        from autopoiesis.twin.profile_files import read_profile  # noqa: PLC0415 - built from this

        return read_profile(Path(name))
    from autopoiesis.twin.roofline import composed  # noqa: PLC0415 - it is built from this module

    entries = _entries()
    if name not in entries:
        return composed(name, tuple(entries))
    entry = dict(entries[name])
    step = StepModel(**entry.pop("step"))
    return Profile(name=name, step=step, **entry)


@numba.njit(cache=True)
def step_s(
    coefficients: NDArray[np.float64],
    tokens: int,
    sequences: int,
    sampling: int,
    decodes: int,
    decode_context_tokens: int,
    prefill_tokens: int,
    prefill_pairs: float,
    prefill_cached_tokens: int,
) -> float:
    """Return one step's duration [s]; `tokens` counts decodes and prefill, contexts the new token."""
    c = coefficients
    p = c[KNEE]
    dense = (c[WEIGHTS] ** p + (c[TOKEN] * tokens) ** p) ** (1.0 / p)
    around = c[HOST] + c[HOST_SEQUENCE] * sequences + c[HEAD] + c[HEAD_SEQUENCE] * sampling
    if prefill_tokens == 0:
        attention = (
            c[DECODE] + c[DECODE_CONTEXT] * decode_context_tokens + c[DECODE_SEQUENCE] * decodes
        )
    else:
        attention = (
            c[MIXED]
            + c[MIXED_CONTEXT] * decode_context_tokens
            + c[MIXED_SEQUENCE] * decodes
            + c[PREFILL_TOKEN] * prefill_tokens
            + c[PREFILL_PAIR] * prefill_pairs
            + c[PREFILL_CACHED] * prefill_cached_tokens
        )
        if decodes > 0:
            attention += c[MIXED_DECODE]
    return dense + around + attention


def at_speed(model: StepModel, speed: float) -> NDArray[np.float64]:
    """Return the coefficients of a replica that is `speed` times as fast."""
    if not (math.isfinite(speed) and speed > 0.0):
        raise ValueError(f"a replica's speed must be above 0, got {speed}")
    coefficients = model.as_array() / speed
    coefficients[KNEE] = model.knee
    return coefficients
