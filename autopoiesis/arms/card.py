"""The reference of the policy language as text: for people in the docs, for models in prompts."""

import ast
import inspect
import itertools
import sys
from functools import cache
from pathlib import Path

from autopoiesis.arms.features import FUNCTIONS, INPUTS
from autopoiesis.arms.language import CALLS, MAX_BLOCKS, MAX_DEPTH, MAX_NODES
from autopoiesis.arms.lexis import MAX_BRACKETS, MAX_BYTES, MAX_LINES, MAX_STATEMENT_TOKENS

_MEANING = {
    "score": "Required. Asked for each replica; the lowest score is the first choice, the others are "
    "fallbacks in order. Equal scores keep the order of `replica.position`.",
    "admit": "Asked once when a request arrives; above 0 it is served, else it is refused with 429. "
    "Without it every request is admitted.",
    "priority": "Order of held requests, lower first. Without it the longest wait goes first.",
    "ceiling": "Asked for each replica; while `replica.in_flight` is not below it, the replica takes no "
    "more, and the best score among the others is the first choice. A request is held when no replica "
    "takes more. Without it nothing is held.",
}

_TEXT = """\
## Functions

A policy is one to four plain functions in a small subset of Python, with exactly these parameters:

{functions}

All see the same request and fleet; `score` and `ceiling` see one replica at a time.

## What may be written

* `name = value`, `name += value` (also `-= *= /= %= **=`) for local names of your own
* `if` / `elif` / `else`, and `return value`; every path must return, every name be assigned on every
  path before it is read
* values: numbers; fields of the parameters; local names; `+ - * / % **`, unary `-`;
  `value if condition else value`; calls of {calls}
* conditions: `< <= > >= == !=` between values (also chained), joined by `and`, `or`, `not`; they stand
  only after `if`, `elif` and inside `value if condition else value`
* comments and docstrings; they do not belong to the policy

Nothing else exists: no loops, lists, subscripts, strings, imports, state, functions of your own, names
that begin with `_`, names of Python's builtins, `//` (write `floor(a / b)`). A comparison is no
number (write `1.0 if a < b else 0.0`) and a number is no condition (write `x > 0.0`). ASCII only.

## What it means

Only floats exist; integer literals are read as floats. Nothing fails and every result is finite:
results beyond the largest float L = 1.8e308 become L or -L; x / 0 is L with the sign of x, 0 / 0 is 0;
x % y has the sign of y, x % 0 is 0; a negative base with a fractional power is 0, 0 to a negative power
is L; sqrt below 0 is 0; log at and below 0 is -L; log is the natural logarithm;
clip(x, low, high) is min(max(x, low), high); min and max take 2 to 16 values.

## Fields

{fields}

## Limits

{limits}

## Example

```python
{example}```
"""


@cache
def language_card() -> str:
    """Return the reference: functions, syntax, semantics, fields, limits and an example."""
    functions = "\n".join(
        f"* `{name}({', '.join(parameters)})`: {_MEANING[name]}"
        for name, parameters in FUNCTIONS.items()
    )
    limits = (
        f"At most {MAX_BYTES} bytes and {MAX_LINES} lines, {MAX_NODES} operations, "
        f"{MAX_STATEMENT_TOKENS} tokens a statement, {MAX_BLOCKS} ifs and {MAX_BRACKETS} brackets inside "
        f"one another, {MAX_DEPTH} levels in all (a sum of n terms and n elifs count n)."
    )
    calls = ", ".join(f"`{name}`" for name in CALLS)
    example = Path(__file__).with_name("seeds") / "shortest-prompt-first.policy"
    return _TEXT.format(
        functions=functions,
        calls=calls,
        fields="\n\n".join(table_of(f"{p}.", field_meanings(p)) for p in INPUTS),
        limits=limits,
        example=example.read_text("ascii"),
    )


def field_meanings(parameter: str) -> dict[str, str]:
    """Return what each field of `request`, `replica` or `fleet` means, by field name."""
    return meanings_of(INPUTS[parameter][0])


def meanings_of(declared: type) -> dict[str, str]:
    """Return what each field of a class means, by field name: the strings below the fields."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(sys.modules[declared.__module__])).body
        if isinstance(node, ast.ClassDef) and node.name == declared.__name__
    )
    meanings: dict[str, str] = {}
    for node, following in itertools.pairwise(body):
        match node, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str() as text)),
            ):
                meanings[name] = text
            case _:
                pass
    return meanings


def table_of(prefix: str, meanings: dict[str, str]) -> str:
    """Return a table of fields and what they mean."""
    rows = [f"| `{prefix}{name}` | {text} |" for name, text in meanings.items()]
    return "\n".join(["| field | meaning |", "| --- | --- |", *rows])
