"""The numbers written in a policy, in the order of the text: what a tuner may turn.

A signed literal such as `-0.5` is one number. Literal k of a policy's source is constant k of its
compiled program, so a tuner can search over programs and write the winner down as a policy.
"""

import ast
import math
from collections.abc import Sequence

from autopoiesis.arms.language import Policy, verify


def value_of(node: ast.AST) -> float | None:
    """Return the number that a node writes, sign included; None if it writes none."""
    match node:
        case ast.Constant(value=float() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=float() as number)):
            return -number
        case _:
            return None


def literal_nodes(tree: ast.AST) -> list[ast.expr]:
    """Return the nodes of canonical source that write a number, in the order of the text."""
    found: list[ast.expr] = []
    ahead: list[ast.AST] = [tree]
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.expr) and value_of(node) is not None:
            found.append(node)
        else:
            ahead.extend(ast.iter_child_nodes(node))
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def literals_of(policy: Policy) -> tuple[float, ...]:
    """Return the policy's numbers."""
    return tuple(value_of(node) or 0.0 for node in literal_nodes(ast.parse(policy.source)))


def with_literals(policy: Policy, values: Sequence[float]) -> Policy:
    """Write the policy with other numbers. Raises ValueError unless as many finite ones come."""
    nodes = literal_nodes(ast.parse(policy.source))
    checked = finite_values(values, len(nodes))
    lines = policy.source.split("\n")
    for node, value in reversed(list(zip(nodes, checked, strict=True))):
        line, end = lines[node.lineno - 1], node.end_col_offset
        text = repr(value) if value >= 0.0 else f"({value!r})"
        lines[node.lineno - 1] = line[: node.col_offset] + text + line[end:]
    return verify("\n".join(lines))


def finite_values(values: Sequence[float], count: int) -> list[float]:
    """Return the values as floats; ValueError unless there are `count`, all finite."""
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"the policy has {count} numbers; pass as many, all of them finite")
    return numbers
