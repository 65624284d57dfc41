"""The machine's total arithmetic."""

import math

import numpy as np
import pytest

from autopoiesis.arms.features import FIRST_CONSTANT
from autopoiesis.arms.machine import (
    LARGEST,
    Op,
    _interpret,
    divide,
    execute,
    exponential,
    logarithm,
    modulo,
    power,
    root,
)

L = LARGEST


@pytest.mark.parametrize(
    ("function", "arguments", "result"),
    [
        (divide, (1.0, 0.0), L),
        (divide, (-1.0, 0.0), -L),
        (divide, (1.0, -0.0), L),
        (divide, (0.0, 0.0), 0.0),
        (divide, (L, 0.1), L),
        (divide, (-L, 0.1), -L),
        (divide, (7.0, 2.0), 3.5),
        (modulo, (7.0, 3.0), 1.0),
        (modulo, (-7.0, 3.0), 2.0),
        (modulo, (7.0, -3.0), -2.0),
        (modulo, (7.0, 0.0), 0.0),
        (power, (0.0, 0.0), 1.0),
        (power, (0.0, 2.0), 0.0),
        (power, (0.0, -2.0), L),
        (power, (-8.0, 0.5), 0.0),
        (power, (-8.0, 3.0), -512.0),
        (power, (-8.0, 2.0), 64.0),
        (power, (-8.0, 1001.0), -L),
        (power, (-8.0, 1000.0), L),
        (power, (9.0, 9e9), L),
        (power, (9.0, -9e9), 0.0),
        (power, (L, L), L),
        (power, (-L, L), L),  # the largest float is even
        (power, (1.0, L), 1.0),
        (root, (9.0,), 3.0),
        (root, (-9.0,), 0.0),
        (exponential, (0.0,), 1.0),
        (exponential, (1e3,), L),
        (exponential, (L,), L),
        (exponential, (-1e3,), 0.0),
        (exponential, (-L,), 0.0),
        (logarithm, (1.0,), 0.0),
        (logarithm, (0.0,), -L),
        (logarithm, (-5.0,), -L),
    ],
)
def test_total_functions(function, arguments, result):
    assert function(*arguments) == result
    with np.errstate(all="ignore"):
        assert function.py_func(*arguments) == result


def run(*code, constants=(), machine=execute):
    registers = np.zeros(FIRST_CONSTANT + len(constants) + 4)
    registers[FIRST_CONSTANT : FIRST_CONSTANT + len(constants)] = constants
    with np.errstate(all="ignore"):
        return machine(np.array(code, np.int32), 0, registers)


@pytest.mark.parametrize("machine", [execute, _interpret.py_func])
def test_saturation_and_not_a_number(machine):
    a, b, t = FIRST_CONSTANT, FIRST_CONSTANT + 1, FIRST_CONSTANT + 2
    back = (Op.RETURN, 0, t, 0)
    assert run((Op.ADD, t, a, b), back, constants=(L, L), machine=machine) == L
    assert run((Op.SUB, t, a, b), back, constants=(-L, L), machine=machine) == -L
    assert run((Op.MUL, t, a, b), back, constants=(L, -2.0), machine=machine) == -L
    # Values that only a broken caller could put there end as the largest float, which sorts last.
    assert run((Op.SUB, t, a, b), back, constants=(math.inf, math.inf), machine=machine) == L
    assert run((Op.ADD, t, a, b), back, constants=(math.nan, 1.0), machine=machine) == L
    assert run((Op.MUL, t, a, b), back, constants=(math.nan, 0.0), machine=machine) == L


@pytest.mark.parametrize("machine", [execute, _interpret.py_func])
@pytest.mark.parametrize(
    ("op", "holds"),
    [
        (Op.JUMP_UNLESS_LT, (True, False, False)),
        (Op.JUMP_UNLESS_LE, (True, True, False)),
        (Op.JUMP_UNLESS_EQ, (False, True, False)),
        (Op.JUMP_UNLESS_NE, (True, False, True)),
        (Op.JUMP, (False, False, False)),
    ],
)
def test_jumps(machine, op, holds):
    a, b = FIRST_CONSTANT, FIRST_CONSTANT + 1
    code = (
        (op, 2, a, b),
        (Op.RETURN, 0, FIRST_CONSTANT + 2, 0),
        (Op.RETURN, 0, FIRST_CONSTANT + 3, 0),
    )
    for pair, expected in zip([(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)], holds, strict=True):
        assert run(*code, constants=(*pair, 1.0, 0.0), machine=machine) == float(expected)
