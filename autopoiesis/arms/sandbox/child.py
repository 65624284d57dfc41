"""What runs in a slow policy's process: it shuts itself off, loads the policy, and answers.

Run as a script by an isolated interpreter without site-packages and with an empty environment.
Requests come on stdin, each as its length in 4 bytes and a value in marshal's format: they are trusted,
and marshal is quick. Answers go to stdout as lines of JSON and are not trusted: the parent checks them,
measures the time, and ends this process.
"""

import importlib
import json
import marshal
import os
import sys
import types
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]
FAULT_CHARACTERS = 400
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> None:
    """Read how to start, shut this process off, load the policy, and answer until there are no requests."""
    requests, answer = _take_pipes()
    start = _next(requests)
    try:
        isolation, lacking = _shut_off(start)
    except Exception as error:
        answer(fault=_told(error))
        return
    answer(isolation=isolation, lacking=lacking)
    source = _next(requests)
    if source is None:  # that was not enough
        return
    module = types.ModuleType("policy")
    sys.modules["policy"] = module  # where dataclasses look for a class's module
    names = vars(module)
    plan, features = _rooms()
    names.update(Plan=plan.Plan, ReplicaGroup=plan.ReplicaGroup)
    try:
        exec(compile(source, "policy", "exec"), names)  # noqa: S102
    except BaseException as error:
        answer(fault=_told(error))
        return
    answer(loaded=True)
    fleet = current = None
    while (request := _next(requests)) is not None:
        sequence, function, told_window, told_fleet, told_plan = request
        window = features.window_from_plain(told_window)
        if told_fleet is not None:  # else it is what it was
            fleet = features.fleet_from_plain(told_fleet)
        if told_plan is not None:
            current = plan.plan_from_plain(told_plan)
        try:
            result = names[function](window, fleet, current)
            answer(sequence=sequence, answer=_plain(function, result, plan))
        except BaseException as error:
            answer(sequence=sequence, fault=_told(error))


def _take_pipes() -> tuple[BufferedReader, Callable[..., None]]:
    """Move the pipes away from stdin and stdout, which then lead nowhere."""
    requests, pipe = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)

    encode = json.JSONEncoder(default=_python, allow_nan=False).encode

    def answer(**values: object) -> None:
        line = encode(values).encode() + b"\n"
        while line:
            line = line[os.write(pipe, line) :]

    return requests, answer


def _next(requests: BufferedReader) -> Any:
    """Return the next request, None if there are no more."""
    length = requests.read(4)
    return marshal.loads(requests.read(int.from_bytes(length, "little"))) if length else None  # noqa: S302


def _rooms() -> tuple[Any, Any]:
    """Return the modules that a policy's values come from.

    They are found without running the package's own __init__, which prepares what is not needed here.
    """
    if "autopoiesis" not in sys.modules:
        package = types.ModuleType("autopoiesis")
        package.__path__ = [str(PACKAGE)]
        sys.modules["autopoiesis"] = package
    return (
        importlib.import_module("autopoiesis.arms.plan"),
        importlib.import_module("autopoiesis.arms.slow_features"),
    )


def _shut_off(start: dict[str, Any]) -> tuple[str, str]:
    """Import everything that will be needed, then close the doors."""
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    library = list(sys.path)
    sys.path += start["paths"]
    _rooms()
    for module in start["modules"]:
        importlib.import_module(module)
    lockdown = importlib.import_module("autopoiesis.arms.sandbox.lockdown")
    sys.path[:] = library
    readable = [path for path in (*library, *start["readable"]) if Path(path).exists()]
    os.dup2(0, 2)
    return lockdown.lock_down(readable, start["memory_bytes"])


def _plain(function: str, result: Any, plan: Any) -> object:
    if function == "schedule":
        if not isinstance(result, plan.Plan):
            raise TypeError(f"schedule returned {_kind(result)}; return a Plan")
        return plan.plan_to_plain(result)
    if _of_numpy(result):
        result = result.item()
    if not isinstance(result, bool):
        raise TypeError(f"should_reschedule returned {_kind(result)}; return True or False")
    return result


def _of_numpy(value: object) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "item")


def _python(value: Any) -> object:
    """Return a NumPy number as Python's."""
    if not _of_numpy(value):
        raise TypeError(f"{_kind(value)} cannot be part of a plan")
    return value.item()


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _told(error: BaseException) -> str:
    """Say what went wrong and where in the policy, in one line."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "policy":
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        words = f"{type(error).__name__}: {error}"
    except BaseException:
        words = type(error).__name__
    where = f"line {line}: " if line else ""
    return (where + " ".join(words.split()))[:FAULT_CHARACTERS]


if __name__ == "__main__":
    main()
