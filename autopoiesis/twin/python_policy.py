"""Policies as ordinary Python functions, for those who design a router and try it in the twin.

They are code that the author trusts: they may import what they like, keep state, and look at
anything. So they live here alone: an arm, which serves live traffic or comes from a synthesizer, is
always a compiled policy. The event loop knows a function by its address and calls it through
CPython's own interface, holding the interpreter's lock, as any extension module would.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from autopoiesis.arms.features import FUNCTIONS, INPUTS, Fleet, Replica, Request
from autopoiesis.arms.machine import LARGEST, execute, finite

Answer = float | bool


@dataclass(frozen=True, slots=True)
class PythonPolicy:
    """A policy's functions, which mean what they mean in a policy's source; only `score` is required.

    Their arguments have the features as attributes, read when asked for; they show the decision at
    hand, so take numbers from them and do not keep the objects. NaN counts as the largest float,
    which sorts last. An exception, or an answer that is no number, ends the simulation.
    """

    score: Callable[[Request, Replica, Fleet], Answer]
    admit: Callable[[Request, Fleet], Answer] | None = None
    priority: Callable[[Request, Fleet], Answer] | None = None
    ceiling: Callable[[Request, Replica, Fleet], Answer] | None = None


class PythonPolicyError(RuntimeError):
    """A function of a Python policy raised, or returned no number."""


class Functions:
    """A Python policy's functions without parameters: they read the registers of one group."""

    def __init__(
        self, policy: PythonPolicy, registers: NDArray[np.float64], stop: Callable[[], None]
    ) -> None:
        self.failure: tuple[str, BaseException] | None = None
        self._stop = stop
        arguments = {
            name: _over(registers, declared, first) for name, (declared, first) in INPUTS.items()
        }
        self._functions = [
            self._without_parameters(name, function, tuple(arguments[p] for p in parameters))
            for name, parameters in FUNCTIONS.items()
            if (function := getattr(policy, name)) is not None
        ]

    @property
    def addresses(self) -> list[int]:
        """The addresses, in the order of a policy's functions; valid as long as this object lives."""
        return [id(function) for function in self._functions]

    def check(self) -> None:
        """Raise what a function has raised, as a PythonPolicyError that names the function."""
        if self.failure is None:
            return
        name, error = self.failure
        if not isinstance(error, Exception):
            raise error
        raise PythonPolicyError(
            f"the Python policy's `{name}` failed: {type(error).__name__}: {error}"
        ) from error

    def _without_parameters(
        self, name: str, function: Callable[..., Any], arguments: tuple[ctypes.Structure, ...]
    ) -> Callable[[], float]:
        def call() -> float:
            try:
                answer = function(*arguments)
                return answer if answer.__class__ is float else _number(answer)
            except BaseException as error:
                if self.failure is None:
                    self.failure = name, error
                    self._stop()
                return LARGEST

        return call


def _number(answer: Any) -> float:
    if isinstance(answer, str) or not hasattr(answer, "__float__"):
        raise TypeError(f"returned {answer!r}, which is no number")
    return float(answer)


def _over(
    registers: NDArray[np.float64], declared: type[NamedTuple], first: int
) -> ctypes.Structure:
    """Lay an object with these features as attributes over the registers from `first` on."""
    fields = [(name, ctypes.c_double) for name in declared._fields]
    laid_out: Any = type(declared.__name__, (ctypes.Structure,), {"_fields_": fields})
    return laid_out.from_buffer(registers.data, first * registers.itemsize)


@intrinsic
def _answer_at(_context: Any, _address: Any) -> Any:
    """Call the Python function at an address, without arguments, and take its answer as a float."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        python = context.get_python_api(builder)
        function = builder.inttoptr(arguments[0], python.pyobj)
        answer = python.call_function_objargs(function, ())
        number = python.float_as_double(answer)
        python.decref(answer)
        return number

    return types.float64(types.int64), generate


@overload(execute)
def _execute(code: Any, start: Any, registers: Any) -> Any:  # noqa: ARG001 - numba's types
    def called(code: Any, start: Any, registers: Any) -> Any:  # noqa: ARG001
        return finite(_answer_at(code[start]))  # pyright: ignore[reportCallIssue]

    return called if code.ndim == 1 else None
