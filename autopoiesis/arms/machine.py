"""The machine that runs policies: a register interpreter over finite floats.

A compiled policy is data (`Program`), not Python code: nothing a policy says is ever executed by
the Python interpreter. There are no loops and jumps go forward only, so every run ends within the
program's length. Every result is finite: overflow saturates, a division by zero saturates towards
the numerator's sign (0/0 is 0), and what would be NaN becomes the largest float, which sorts last.
"""

import math
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from autopoiesis.arms.kernels import entry, kernel

LARGEST = 1.7976931348623157e308
"""Results are clipped to [-LARGEST, LARGEST]."""


class Op(IntEnum):
    """Operations: `(op, target, a, b)`, where target, a and b are registers unless said otherwise."""

    RETURN = 0
    """Return register a."""
    COPY = 1
    ADD = 2
    SUB = 3
    MUL = 4
    DIV = 5
    MOD = 6
    POW = 7
    NEG = 8
    MIN = 9
    MAX = 10
    ABS = 11
    SQRT = 12
    EXP = 13
    LOG = 14
    FLOOR = 15
    CEIL = 16
    JUMP = 17
    """Go to instruction `target`."""
    JUMP_UNLESS_LT = 18
    """Go to instruction `target` unless a < b."""
    JUMP_UNLESS_LE = 19
    JUMP_UNLESS_EQ = 20
    JUMP_UNLESS_NE = 21


class Program(NamedTuple):
    """A compiled policy."""

    code: NDArray[np.int32]
    """(instructions, 4): op, target, a, b."""
    entry: NDArray[np.int64]
    """(4,): first instruction of score, admit, priority, ceiling; -1 where absent."""
    registers: NDArray[np.float64]
    """(registers,): features (zero), then constants (their values), then temporaries (zero)."""
    constants: int
    """How many constants, from register `features.FIRST_CONSTANT` on."""


SCORE, ADMIT, PRIORITY, CEILING = 0, 1, 2, 3
"""Indexes into `Program.entry`."""

_RETURN, _COPY, _ADD, _SUB, _MUL, _DIV, _MOD, _POW, _NEG = (int(op) for op in list(Op)[:9])
_MIN, _MAX, _ABS, _SQRT, _EXP, _LOG, _FLOOR, _CEIL = (int(op) for op in list(Op)[9:17])
_JUMP, _LT, _LE, _EQ, _NE = (int(op) for op in list(Op)[17:])


@entry
def finite(x: float) -> float:
    """Clip to what policies compute with; NaN becomes the largest."""
    if x > LARGEST or x != x:  # noqa: PLR0124 - only NaN differs from itself
        return LARGEST
    return max(x, -LARGEST)


@entry
def divide(a: float, b: float) -> float:
    """Total division: x/0 saturates with the sign of x, 0/0 is 0."""
    if b == 0.0:
        return 0.0 if a == 0.0 else (LARGEST if a > 0.0 else -LARGEST)
    return finite(a / b)


@entry
def modulo(a: float, b: float) -> float:
    """Total floor modulo: x % 0 is 0."""
    return 0.0 if b == 0.0 else finite(a - b * np.floor(finite(a / b)))


@entry
def power(a: float, b: float) -> float:
    """Total power: 0 to a negative power saturates, a negative base with a fractional power is 0."""
    if a == 0.0:
        return 1.0 if b == 0.0 else (0.0 if b > 0.0 else LARGEST)
    if a < 0.0 and b != np.floor(b):
        return 0.0
    magnitude = b * math.log(abs(a))
    if magnitude > 709.78:
        return -LARGEST if a < 0.0 and b % 2.0 == 1.0 else LARGEST
    return 0.0 if magnitude < -745.0 else finite(a**b)


@entry
def root(a: float) -> float:
    """Total square root: 0 below 0."""
    return math.sqrt(a) if a > 0.0 else 0.0


@entry
def exponential(a: float) -> float:
    """Total exponential: saturates."""
    return LARGEST if a > 709.78 else (0.0 if a < -745.0 else math.exp(a))


@entry
def logarithm(a: float) -> float:
    """Total natural logarithm: -LARGEST at and below 0."""
    return math.log(a) if a > 0.0 else -LARGEST


def execute(code: NDArray[np.int32], start: int, registers: NDArray[np.float64]) -> float:
    """Run the function that begins at instruction `start` and return its result.

    `registers` must hold the features and constants; temporaries are overwritten. In kernels the
    type of `code` chooses what this means: instructions are interpreted, here; another room may
    bring a type of its own.
    """
    return _run(code, start, registers)


@overload(execute)
def _execute(code: Any, start: Any, registers: Any) -> Any:  # noqa: ARG001 - numba's types
    def interpreted(code: Any, start: Any, registers: Any) -> Any:
        return _interpret(code, start, registers)

    return interpreted if code.ndim == 2 else None


@kernel
def _interpret(code: NDArray[np.int32], start: int, registers: NDArray[np.float64]) -> float:
    # Unsigned, because numba looks at every signed index whether it counts from the end.
    at = np.uint64(start)
    while True:
        op, target = code[at, 0], np.uint64(code[at, 1])
        i, j = np.uint64(code[at, 2]), np.uint64(code[at, 3])
        at += np.uint64(1)
        if op == _RETURN:
            return registers[i]
        if op >= _JUMP:
            a, b = registers[i], registers[j]
            if (
                op == _JUMP
                or (op == _LT and not a < b)
                or (op == _LE and not a <= b)
                or (op == _EQ and a != b)
                or (op == _NE and a == b)
            ):
                at = target
            continue
        a = registers[i]
        if op <= _MUL:
            if op == _COPY:
                x = a
            elif op == _ADD:
                x = finite(a + registers[j])
            elif op == _SUB:
                x = finite(a - registers[j])
            else:
                x = finite(a * registers[j])
        elif op == _DIV:
            x = divide(a, registers[j])
        elif op == _MIN:
            x = min(a, registers[j])
        elif op == _MAX:
            x = max(a, registers[j])
        elif op == _NEG:
            x = -a
        elif op == _ABS:
            x = abs(a)
        elif op == _MOD:
            x = modulo(a, registers[j])
        elif op == _POW:
            x = power(a, registers[j])
        elif op == _SQRT:
            x = root(a)
        elif op == _EXP:
            x = exponential(a)
        elif op == _LOG:
            x = logarithm(a)
        elif op == _FLOOR:
            x = np.floor(a)
        else:
            x = np.ceil(a)
        registers[target] = x


@entry
def _run(code: NDArray[np.int32], start: int, registers: NDArray[np.float64]) -> float:
    return _interpret(code, start, registers)
