"""The policy language: a small total subset of Python, checked by what it allows.

`verify` reads a policy and writes it down again: the canonical source is composed here, token by
token, from what was recognised, so nothing unrecognised can be in it. Policies are never executed
by Python; `compiler` turns them into data for `machine`.
"""

import ast
import builtins
import difflib
import math
from dataclasses import dataclass
from typing import NoReturn

from autopoiesis.arms.arm import text_id
from autopoiesis.arms.features import FUNCTIONS, INPUTS
from autopoiesis.arms.lexis import PolicyError, check_tokens, plain_text, thought_of

__all__ = [
    "CALLS",
    "COMPARISONS",
    "MAX_DEPTH",
    "MAX_NODES",
    "OPERATORS",
    "Policy",
    "PolicyError",
    "thought_of",
    "verify",
]

MAX_NODES = 2000
"""Statements and expressions in a policy."""
MAX_DEPTH = 64
"""Nesting of statements and expressions; a sum of n terms and n elifs nest n deep."""
MAX_BLOCKS = 16
"""Nesting of ifs."""

CALLS: dict[str, tuple[int, int]] = {
    "min": (2, 16),
    "max": (2, 16),
    "abs": (1, 1),
    "sqrt": (1, 1),
    "exp": (1, 1),
    "log": (1, 1),
    "floor": (1, 1),
    "ceil": (1, 1),
    "clip": (3, 3),
}
"""Functions a policy may call: fewest and most arguments."""

_RESERVED = frozenset({*dir(builtins), *CALLS, *FUNCTIONS, *INPUTS})

# How tightly an expression binds; a looser one inside a tighter one needs parentheses.
_CHOICE, _OR, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(10)

OPERATORS: dict[type[ast.operator], tuple[str, int, int, int]] = {
    ast.Add: ("+", _SUM, _SUM, _PRODUCT),
    ast.Sub: ("-", _SUM, _SUM, _PRODUCT),
    ast.Mult: ("*", _PRODUCT, _PRODUCT, _SIGN),
    ast.Div: ("/", _PRODUCT, _PRODUCT, _SIGN),
    ast.Mod: ("%", _PRODUCT, _PRODUCT, _SIGN),
    ast.Pow: ("**", _POWER, _ATOM, _SIGN),
}
"""Operator: its sign, its binding, the least binding of its left and of its right side."""
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}

_STATEMENT_HINTS: dict[str, str] = {
    "For": "there are no loops: a function is asked once per replica",
    "While": "there are no loops: a function is asked once per replica",
    "Import": "there are no imports: the functions " + ", ".join(CALLS) + " are there already",
    "ImportFrom": "there are no imports: the functions " + ", ".join(CALLS) + " are there already",
    "FunctionDef": "define only " + ", ".join(FUNCTIONS) + ", at the top level",
    "AnnAssign": "leave the annotation out",
    "Pass": "leave it out, or turn the condition round",
    "Global": "policies keep no state; use local names and features",
    "Nonlocal": "policies keep no state; use local names and features",
    "Raise": "return a number instead",
    "Try": "nothing can fail: divisions, powers and logarithms are total",
    "Assert": "write an if that returns",
    "ClassDef": "write plain functions",
    "AsyncFunctionDef": "write a plain def",
    "Delete": "names need no deleting",
    "With": "leave it out",
    "Match": "write if / elif / else",
}
_VALUE_HINTS: dict[str, str] = {
    "Compare": "a comparison is no number: write 1.0 if a < b else 0.0",
    "BoolOp": "`and` and `or` stand only in conditions: write 1.0 if a and b else 0.0",
    "Tuple": "a value is one number; leave the comma out",
    "Lambda": "there are no functions of your own: use local names",
    "Starred": "write the arguments out",
    "GeneratorExp": "there are no loops: write the terms out",
    "Await": "leave it out",
    "Yield": "return one number",
    "YieldFrom": "return one number",
    "JoinedStr": "there is no text, only numbers",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """A verified policy in canonical form."""

    source: str
    """Canonical source: functions in fixed order, floats only, no comments."""
    id: str
    """First 12 hex digits of the SHA-256 of `source`."""
    functions: frozenset[str]
    """Which of score, admit, priority, ceiling it defines."""


def verify(source: str | bytes) -> Policy:
    """Check a policy's source and return it in canonical form.

    Verifying canonical source returns it unchanged. Raises PolicyError, whatever the input.
    """
    try:
        functions = _functions(plain_text(source))
        canonical = _join(functions)
        stable = _is_stable(canonical)
    except (RecursionError, MemoryError):
        raise PolicyError("it is nested too deeply to read; use local names") from None
    if not stable:
        raise PolicyError("its canonical form is not stable; write simpler expressions")
    return Policy(canonical, text_id(canonical), frozenset(functions))


def _is_stable(canonical: str) -> bool:
    """Tell whether canonical source verifies to itself."""
    try:
        return _join(_functions(plain_text(canonical))) == canonical
    except PolicyError as error:
        raise PolicyError(f"written out in canonical form it is too large: {error}") from None


def _join(functions: dict[str, str]) -> str:
    return "\n\n".join(functions[name] for name in FUNCTIONS if name in functions) + "\n"


def _functions(text: str) -> dict[str, str]:
    """Return each function's canonical source."""
    check_tokens(text)
    functions: dict[str, str] = {}
    try:
        tree = ast.parse(text)
        _check_size(tree)
        for statement in _without_docstring(tree.body):
            if not isinstance(statement, ast.FunctionDef):
                _refuse(statement, "only function definitions stand at the top level", statement)
            if statement.name in functions:
                _refuse(statement, f"`{statement.name}` is defined twice; keep one")
            functions[statement.name] = _Function(statement).source()
    except SyntaxError as error:
        line = error.lineno or 1
        raise PolicyError(f"line {line}: not valid Python: {error.msg}; correct it") from None
    if "score" not in functions:
        raise PolicyError("line 1: `score` is missing; add def score(request, replica, fleet)")
    return functions


def _check_size(tree: ast.AST) -> None:
    """Bound nodes and depth without recursion, so that everything after may recurse."""
    nodes = 0
    level: list[ast.AST] = [tree]
    for depth in range(MAX_DEPTH + 2):
        below: list[ast.AST] = []
        for node in level:
            nodes += isinstance(node, ast.expr | ast.stmt)
            below.extend(ast.iter_child_nodes(node))
            if nodes > MAX_NODES:
                raise PolicyError(f"it has over {MAX_NODES} operations; write a shorter policy")
            if depth > MAX_DEPTH and isinstance(node, ast.expr | ast.stmt):
                _refuse(node, f"nested over {MAX_DEPTH} deep; split it with local names")
        level = below


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    match body:
        case [ast.Expr(value=ast.Constant(value=str())), *rest]:
            return rest
        case _:
            return body


def _refuse(node: ast.AST, what: str, unknown: ast.AST | None = None) -> NoReturn:
    """Raise PolicyError at the node's line, with the advice known for an `unknown` node."""
    if unknown is not None:
        kind = type(unknown).__name__
        hint = _STATEMENT_HINTS.get(kind) or _VALUE_HINTS.get(kind) or "leave it out"
        what = f"{what}; {hint}"
    raise PolicyError(f"line {getattr(node, 'lineno', 1)}: {what}")


def _only(node: ast.AST, *fields: str) -> None:
    """Refuse a node that carries anything beside the named fields."""
    for field, value in ast.iter_fields(node):
        if field not in fields and value not in (None, [], 0):
            _refuse(node, f"{field.replace('_', ' ')} has no place here; leave it out")


class _Function:
    """Checks one function and writes its canonical source."""

    def __init__(self, node: ast.FunctionDef) -> None:
        if node.name not in FUNCTIONS:
            _refuse(node, f"`{node.name}` is no function of a policy", node)
        self.node = node
        self.parameters = FUNCTIONS[node.name]
        self.lines: list[str] = []

    def source(self) -> str:
        node, signature = self.node, ", ".join(self.parameters)
        _only(node, "name", "args", "body")
        _only(node.args, "args")
        for argument in node.args.args:
            _only(argument, "arg")
        if tuple(argument.arg for argument in node.args.args) != self.parameters:
            _refuse(node, f"the parameters differ; write def {node.name}({signature}):")
        self.lines.append(f"def {node.name}({signature}):")
        body = _without_docstring(node.body)
        if not body:
            _refuse(node, f"`{node.name}` does nothing; return a number")
        if self.block(body, frozenset(), 1) is not None:
            _refuse(body[-1], f"a path through `{node.name}` ends without return; add one")
        return "\n".join(self.lines)

    def block(
        self, statements: list[ast.stmt], assigned: frozenset[str], indent: int
    ) -> frozenset[str] | None:
        """Check statements; return the names assigned after them, None if all paths returned."""
        if indent > MAX_BLOCKS:
            _refuse(statements[0], f"ifs nested over {MAX_BLOCKS} deep; use `and` or elif")
        after: frozenset[str] | None = assigned
        for statement in statements:
            if after is None:
                _refuse(statement, "never reached, every path has returned before; remove it")
            after = self.statement(statement, after, indent)
        return after

    def statement(
        self, node: ast.stmt, assigned: frozenset[str], indent: int
    ) -> frozenset[str] | None:
        if isinstance(node, ast.Return):
            _only(node, "value")
            if node.value is None:
                _refuse(node, "return needs a number; write return 0.0")
            self.write(indent, f"return {self.value(node.value, assigned)}")
            return None
        if isinstance(node, ast.Assign):
            _only(node, "targets", "value")
            if len(node.targets) != 1:
                _refuse(node, "one name per assignment; write one line for each")
            name = self.target(node.targets[0])
            self.write(indent, f"{name} = {self.value(node.value, assigned)}")
            return assigned | {name}
        if isinstance(node, ast.AugAssign):
            _only(node, "target", "op", "value")
            name = self.target(node.target)
            left = self.name(node.target, name, assigned), _ATOM
            text, _ = self.binary(node, node.op, left, self.expression(node.value, assigned))
            self.write(indent, f"{name} = {text}")
            return assigned
        if isinstance(node, ast.If):
            return self.branch(node, "if", assigned, indent)
        if isinstance(node, ast.Expr):
            _refuse(node, "a value that nobody uses; assign or return it, or leave it out")
        _refuse(node, f"`{type(node).__name__}` statements do not exist here", node)

    def branch(
        self, node: ast.If, word: str, assigned: frozenset[str], indent: int
    ) -> frozenset[str] | None:
        _only(node, "test", "body", "orelse")
        self.write(indent, f"{word} {self.condition(node.test, assigned)[0]}:")
        then = self.block(node.body, assigned, indent + 1)
        match node.orelse:
            case []:
                otherwise: frozenset[str] | None = assigned
            case [ast.If() as following]:
                otherwise = self.branch(following, "elif", assigned, indent)
            case statements:
                self.write(indent, "else:")
                otherwise = self.block(statements, assigned, indent + 1)
        if then is None or otherwise is None:
            return otherwise if then is None else then
        return then & otherwise

    def write(self, indent: int, text: str) -> None:
        self.lines.append("    " * indent + text)

    def target(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name):
            _refuse(node, "only a local name can be assigned; write name = value")
        if node.id in _RESERVED:
            _refuse(node, f"`{node.id}` is taken; choose another name, such as my_{node.id}")
        if node.id.startswith("_"):
            _refuse(node, f"`{node.id}` begins with an underscore; choose another name")
        return node.id

    def value(self, node: ast.expr, assigned: frozenset[str], least: int = _CHOICE) -> str:
        return _wrapped(self.expression(node, assigned), least)

    def expression(self, node: ast.expr, assigned: frozenset[str]) -> tuple[str, int]:
        """Check a numeric expression; return its canonical text and how tightly it binds."""
        if isinstance(node, ast.Constant):
            _only(node, "value")
            return self.number(node), _ATOM
        if isinstance(node, ast.Name):
            _only(node, "id", "ctx")
            return self.name(node, node.id, assigned), _ATOM
        if isinstance(node, ast.Attribute):
            _only(node, "value", "attr", "ctx")
            return self.feature(node), _ATOM
        if isinstance(node, ast.BinOp):
            _only(node, "left", "op", "right")
            left = self.expression(node.left, assigned)
            right = self.expression(node.right, assigned)
            return self.binary(node, node.op, left, right)
        if isinstance(node, ast.UnaryOp):
            return self.sign(node, assigned)
        if isinstance(node, ast.IfExp):
            _only(node, "test", "body", "orelse")
            then = self.value(node.body, assigned, _OR)
            test = self.condition(node.test, assigned)[0]
            return f"{then} if {test} else {self.value(node.orelse, assigned)}", _CHOICE
        if isinstance(node, ast.Call):
            return self.call(node, assigned), _ATOM
        kind = type(node).__name__
        _refuse(node, f"`{kind}` is no numeric expression of the language", node)

    def number(self, node: ast.Constant) -> str:
        if type(node.value) not in {int, float}:
            shown = ascii(node.value)[:40]
            _refuse(node, f"{shown} is no number; only numbers exist, write 1.0 or 0.0")
        try:
            number = float(node.value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            _refuse(node, "this number is too large; write one below 1e308")
        return repr(number)

    def name(self, node: ast.expr, name: str, assigned: frozenset[str]) -> str:
        if name in assigned:
            return name
        if name in CALLS:
            _refuse(node, f"`{name}` is a function; call it, as in {name}(...)")
        if name in self.parameters:
            _refuse(node, f"`{name}` is no number; read a field, such as {_example_field(name)}")
        _refuse(node, f"`{name[:40]}` is not assigned on every path before; assign it first")

    def feature(self, node: ast.Attribute) -> str:
        owner = node.value
        if not (isinstance(owner, ast.Name) and owner.id in self.parameters):
            known = ", ".join(self.parameters)
            _refuse(node, f"`{self.node.name}` sees only {known}; read their fields")
        fields = INPUTS[owner.id][0]._fields
        if node.attr not in fields:
            close = difflib.get_close_matches(node.attr[:40], fields, 1, 0.5)
            instead = f"did you mean {owner.id}.{close[0]}?" if close else "its fields: "
            known = "" if close else ", ".join(fields)
            _refuse(node, f"`{owner.id}` has no field `{node.attr[:40]}`; {instead}{known}")
        return f"{owner.id}.{node.attr}"

    def binary(
        self, node: ast.AST, operator: ast.operator, left: tuple[str, int], right: tuple[str, int]
    ) -> tuple[str, int]:
        if type(operator) not in OPERATORS:
            _refuse(node, f"operator {type(operator).__name__}; use + - * / % **")
        sign, binding, left_least, right_least = OPERATORS[type(operator)]
        return f"{_wrapped(left, left_least)} {sign} {_wrapped(right, right_least)}", binding

    def sign(self, node: ast.UnaryOp, assigned: frozenset[str]) -> tuple[str, int]:
        negative = False
        inner: ast.expr = node
        while isinstance(inner, ast.UnaryOp):  # two minus signs cancel, a plus does nothing
            _only(inner, "op", "operand")
            if isinstance(inner.op, ast.Not):
                _refuse(node, "`not` stands only in conditions; write 0.0 if a < b else 1.0")
            if not isinstance(inner.op, ast.USub | ast.UAdd):
                _refuse(node, f"operator {type(inner.op).__name__}; use + - * / % **")
            negative ^= isinstance(inner.op, ast.USub)
            inner = inner.operand
        operand = self.expression(inner, assigned)
        return (f"-{_wrapped(operand, _SIGN)}", _SIGN) if negative else operand

    def call(self, node: ast.Call, assigned: frozenset[str]) -> str:
        _only(node, "func", "args")
        if not isinstance(node.func, ast.Name) or node.func.id not in CALLS:
            _refuse(node, "only these can be called: " + ", ".join(CALLS))
        name, (fewest, most) = node.func.id, CALLS[node.func.id]
        if not fewest <= len(node.args) <= most:
            wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
            _refuse(node, f"{name} takes {wanted} arguments, not {len(node.args)}; correct it")
        return f"{name}({', '.join(self.value(argument, assigned) for argument in node.args)})"

    def condition(self, node: ast.expr, assigned: frozenset[str]) -> tuple[str, int]:
        """Check a condition; return its canonical text and how tightly it binds."""
        if isinstance(node, ast.Compare):
            _only(node, "left", "ops", "comparators")
            text = self.value(node.left, assigned, _SUM)
            for operator, right in zip(node.ops, node.comparators, strict=True):
                if type(operator) not in COMPARISONS:
                    _refuse(node, "only numbers are compared; use < <= > >= == !=")
                text += f" {COMPARISONS[type(operator)]} {self.value(right, assigned, _SUM)}"
            return text, _COMPARE
        if isinstance(node, ast.BoolOp):
            _only(node, "op", "values")
            word, binding = (" and ", _AND) if isinstance(node.op, ast.And) else (" or ", _OR)
            parts = [_wrapped(self.condition(value, assigned), binding) for value in node.values]
            return word.join(parts), binding
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            _only(node, "op", "operand")
            return f"not {_wrapped(self.condition(node.operand, assigned), _NOT)}", _NOT
        self.expression(node, assigned)
        _refuse(node, "a condition compares numbers; write for example x > 0.0")


def _wrapped(expression: tuple[str, int], least: int) -> str:
    text, binding = expression
    return text if binding >= least else f"({text})"


def _example_field(parameter: str) -> str:
    return f"{parameter}.{INPUTS[parameter][0]._fields[0]}"
