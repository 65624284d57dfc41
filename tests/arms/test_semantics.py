"""One meaning: compiled code, the same code interpreted, and a plain-Python oracle agree."""

import ast
import math
import operator
import random
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from autopoiesis.arms.compiler import compile_policy, constants_of, with_constants
from autopoiesis.arms.features import FIRST_CONSTANT, FUNCTIONS, INPUTS
from autopoiesis.arms.language import verify
from autopoiesis.arms.literals import literals_of, with_literals
from autopoiesis.arms.machine import LARGEST, _interpret, execute

# --- a strategy that writes valid policies -------------------------------------------------------

NUMBERS = ["0", "1", "2", "3", "7", "0.5", "1.5", "1e-3", "100", "1e6", "1e300", "5e-324", "0.1"]
CALLS = {
    "min": 2,
    "max": 2,
    "abs": 1,
    "sqrt": 1,
    "exp": 1,
    "log": 1,
    "floor": 1,
    "ceil": 1,
    "clip": 3,
}


class Writer:
    """Writes one random policy; `size` bounds how deep values and ifs nest."""

    def __init__(self, seed, size):
        self.random = random.Random(seed)
        self.size = size

    def pick(self, options):
        return self.random.choice(options)

    def chance(self, percent):
        return self.random.randrange(100) < percent

    def value(self, names, parameters, depth):
        if depth == 0 or self.chance(25):
            return self.leaf(names, parameters)
        kind = self.pick(["binary", "binary", "call", "choice", "sign"])
        if kind == "binary":
            left, right = (self.value(names, parameters, depth - 1) for _ in range(2))
            return f"({left}) {self.pick(['+', '-', '*', '/', '%', '**'])} ({right})"
        if kind == "call":
            name = self.pick(list(CALLS))
            count = CALLS[name] + (self.random.randint(0, 2) if name in {"min", "max"} else 0)
            inside = [self.value(names, parameters, depth - 1) for _ in range(count)]
            return f"{name}({', '.join(inside)})"
        if kind == "sign":
            return f"{self.pick(['-', '+', '- -'])}({self.value(names, parameters, depth - 1)})"
        then, otherwise = (self.value(names, parameters, depth - 1) for _ in range(2))
        return f"({then} if {self.condition(names, parameters, depth - 1)} else {otherwise})"

    def leaf(self, names, parameters):
        kind = self.pick(["number", "field", "field", "name"])
        if kind == "number":
            return self.pick(NUMBERS)
        if kind == "name" and names:
            return self.pick(sorted(names))
        parameter = self.pick(parameters)
        return f"{parameter}.{self.pick(INPUTS[parameter][0]._fields)}"

    def condition(self, names, parameters, depth):
        kind = (
            self.pick(["compare", "compare", "chain", "and", "or", "not"]) if depth else "compare"
        )
        if kind in {"and", "or"}:
            count = self.random.randint(2, 3)
            parts = [f"({self.condition(names, parameters, depth - 1)})" for _ in range(count)]
            return f" {kind} ".join(parts)
        if kind == "not":
            return f"not ({self.condition(names, parameters, depth - 1)})"
        sides = 3 if kind == "chain" else 2
        text = f"({self.value(names, parameters, max(depth - 1, 0))})"
        for _ in range(sides - 1):
            sign = self.pick(["<", "<=", ">", ">=", "==", "!="])
            text += f" {sign} ({self.value(names, parameters, max(depth - 1, 0))})"
        return text

    def block(self, names, parameters, depth, indent):
        """Return lines and the names assigned after them (None: every path returned)."""
        lines = []
        pad = " " * indent
        for _ in range(self.random.randint(1, 3)):
            kind = self.pick(["assign", "assign", "augment", "if"])
            if kind == "if" and depth:
                new, names = self.branch(names, parameters, depth - 1, indent)
                lines += new
                if names is None:
                    return lines, None
            elif kind == "augment" and names:
                sign = self.pick(["+", "-", "*", "/", "%", "**"])
                name = self.pick(sorted(names))
                lines.append(
                    f"{pad}{name} {sign}= {self.value(names, parameters, min(self.size, 2))}"
                )
            else:
                name = self.pick(["a", "b", "load", "x1"])
                lines.append(f"{pad}{name} = {self.value(names, parameters, self.size)}")
                names = names | {name}
        if self.chance(20):
            lines.append(f"{pad}return {self.value(names, parameters, self.size)}")
            return lines, None
        return lines, names

    def branch(self, names, parameters, depth, indent):
        pad = " " * indent
        lines, ends = [], []
        words = self.pick([["if"], ["if", "else"], ["if", "elif", "else"], ["if", "elif"]])
        for word in words:
            test = (
                "" if word == "else" else " " + self.condition(names, parameters, min(self.size, 2))
            )
            inner, after = self.block(names, parameters, depth, indent + 2)
            lines += [f"{pad}{word}{test}:", *inner]
            ends.append(after)
        if words[-1] != "else":
            ends.append(names)
        open_ends = [end for end in ends if end is not None]
        return lines, frozenset.intersection(*open_ends) if open_ends else None

    def policy(self):
        parts = []
        for name in self.random.sample(list(FUNCTIONS), len(FUNCTIONS)):
            if name != "score" and self.chance(60):
                continue
            parameters = FUNCTIONS[name]
            lines, names = self.block(frozenset(), parameters, min(self.size, 2), 2)
            if names is not None:
                lines.append(f"  return {self.value(names, parameters, self.size)}")
            parts.append("\n".join([f"def {name}({', '.join(parameters)}):", *lines]))
        return "\n".join(parts)


def write_policy(seed, size):
    """Write a policy within the language's bounds."""
    while True:
        source = Writer(seed, size).policy()
        longest = max(len(re.findall(r"[\w.]+|[^\w\s.]", line)) for line in source.splitlines())
        if len(source) < 3000 and longest < 150:
            return source
        seed += 1


POLICIES = st.builds(write_policy, st.integers(0, 1 << 48), st.integers(0, 3))


SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, 3.5, 1e-300, 5e-324, 1e154, 1e308, LARGEST, -LARGEST]


def write_features(seed):
    """Draw a value for every feature: special, of every size, ordinary, whole."""
    rng = random.Random(seed)
    kinds = [
        lambda: rng.choice(SPECIAL),
        lambda: rng.choice([-1, 1]) * 10 ** rng.uniform(-308, 308),
        lambda: rng.uniform(-100, 100),
        lambda: float(rng.randint(-50, 5000)),
    ]
    return [rng.choice(kinds)() for _ in range(FIRST_CONSTANT)]


FEATURES = st.builds(write_features, st.integers(0, 1 << 48))

# --- the oracle: total semantics, written again ----------------------------------------------------


def finite(x):
    return LARGEST if math.isnan(x) else min(max(x, -LARGEST), LARGEST)


def total_divide(a, b):
    if b != 0:
        return finite(a / b)
    return math.copysign(LARGEST, a) if a else 0.0


def total_power(a, b):
    if a == 0:
        return 1.0 if b == 0 else 0.0 if b > 0 else LARGEST
    if a < 0 and not b.is_integer():
        return 0.0
    try:
        return a**b
    except OverflowError:
        return -LARGEST if a < 0 and math.fmod(b, 2) != 0 else LARGEST


def total_exp(a):
    try:
        return math.exp(a)
    except OverflowError:
        return LARGEST


BINARY = {
    ast.Add: lambda a, b: finite(a + b),
    ast.Sub: lambda a, b: finite(a - b),
    ast.Mult: lambda a, b: finite(a * b),
    ast.Div: total_divide,
    ast.Mod: lambda a, b: finite(a - b * float(np.floor(total_divide(a, b)))) if b else 0.0,
    ast.Pow: total_power,
}
COMPARE = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
CALL = {
    "min": min,
    "max": max,
    "abs": abs,
    "sqrt": lambda a: math.sqrt(a) if a > 0 else 0.0,
    "exp": total_exp,
    "log": lambda a: math.log(a) if a > 0 else -LARGEST,
    "floor": lambda a: float(np.floor(a)),
    "ceil": lambda a: float(np.ceil(a)),
    "clip": lambda x, low, high: min(max(x, low), high),
}


def value(node, fields, local):
    match node:
        case ast.Constant(value=number):
            assert type(number) is float
            return number
        case ast.Name(id=name):
            return local[name]
        case ast.Attribute(value=ast.Name(id=parameter), attr=attr):
            return fields[parameter, attr]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand, fields, local)
        case ast.BinOp(left=left, op=op, right=right):
            return BINARY[type(op)](value(left, fields, local), value(right, fields, local))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return value(body if true(test, fields, local) else orelse, fields, local)
        case ast.Call(func=ast.Name(id=name), args=args):
            return CALL[name](*[value(a, fields, local) for a in args])


def true(node, fields, local):
    match node:
        case ast.BoolOp(op=ast.And(), values=values):
            return all(true(v, fields, local) for v in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(true(v, fields, local) for v in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not true(operand, fields, local)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = [value(side, fields, local) for side in [left, *comparators]]
            return all(
                COMPARE[type(o)](a, b) for o, a, b in zip(ops, sides, sides[1:], strict=False)
            )


def run(statements, fields, local):
    for statement in statements:
        match statement:
            case ast.Return(value=result):
                return value(result, fields, local)
            case ast.Assign(targets=[ast.Name(id=name)], value=new):
                local[name] = value(new, fields, local)
            case ast.If(test=test, body=body, orelse=orelse):
                returned = run(body if true(test, fields, local) else orelse, fields, local)
                if returned is not None:
                    return returned
    return None


def oracle(source, features):
    fields = {
        (parameter, field): features[first + i]
        for parameter, (declared, first) in INPUTS.items()
        for i, field in enumerate(declared._fields)
    }
    return {f.name: run(f.body, fields, {}) for f in ast.parse(source).body}


def results(program, features, machine):
    registers = program.registers.copy()
    registers[:FIRST_CONSTANT] = features
    with np.errstate(all="ignore"):
        return {
            name: float(machine(program.code, start, registers))
            for name, start in zip(FUNCTIONS, program.entry, strict=True)
            if start >= 0
        }


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-300)


# --- properties -------------------------------------------------------------------------------------

SETTINGS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.generate,),
    "derandomize": True,
}


@settings(max_examples=120, **SETTINGS)
@given(POLICIES, st.lists(FEATURES, min_size=1, max_size=4))
def test_machine_and_oracle_agree_and_are_finite(source, rows):
    policy = verify(source)
    program = compile_policy(policy)
    for features in rows:
        expected = oracle(policy.source, features)
        assert set(expected) == policy.functions
        for machine in (execute, _interpret.py_func):
            found = results(program, features, machine)
            assert found.keys() == expected.keys()
            for name, number in found.items():
                assert math.isfinite(number)
                assert close(number, expected[name]), (name, policy.source, features)


@settings(max_examples=120, **SETTINGS)
@given(POLICIES, FEATURES)
def test_canonical_form_is_a_fixed_point_with_the_same_meaning(source, features):
    policy = verify(source)
    assert verify(policy.source) == policy
    assert policy.source.isascii()
    # Augmented assignment is the only statement that the canonical form rewrites.
    if not any(isinstance(node, ast.AugAssign) for node in ast.walk(ast.parse(source))):
        assert ast.dump(_normal(ast.parse(policy.source))) == ast.dump(_normal(ast.parse(source)))


class _Normal(ast.NodeTransformer):
    """Removes what the canonical form may change: integer literals, signs, and/or nesting."""

    def visit_Constant(self, node):
        return ast.Constant(float(node.value))

    def visit_UnaryOp(self, node):
        node = self.generic_visit(node)
        if isinstance(node.op, ast.UAdd):
            return node.operand
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.UnaryOp):
            return node.operand.operand
        return node

    def visit_BoolOp(self, node):
        node = self.generic_visit(node)
        flat = []
        for part in node.values:
            same = isinstance(part, ast.BoolOp) and type(part.op) is type(node.op)
            flat += part.values if same else [part]
        return ast.BoolOp(node.op, flat)


def _normal(tree):
    tree.body.sort(key=lambda function: list(FUNCTIONS).index(function.name))
    return _Normal().visit(tree)


@settings(max_examples=60, **SETTINGS)
@given(POLICIES, st.data(), FEATURES)
def test_tuned_program_is_the_program_of_the_tuned_source(source, data, features):
    policy = verify(source)
    program = compile_policy(policy)
    assert tuple(constants_of(program)) == literals_of(policy)
    count = program.constants
    values = data.draw(st.lists(st.floats(-1e3, 1e3), min_size=count, max_size=count))
    tuned, rewritten = with_constants(program, values), with_literals(policy, values)
    assert tuned.code is program.code
    again = compile_policy(rewritten)
    assert results(tuned, features, execute) == results(again, features, execute)


def test_tuning_refuses_what_does_not_fit():
    policy = verify("def score(request, replica, fleet):\n  return 2 * replica.in_flight - 3")
    assert with_literals(policy, [1.0, -3]).source.endswith(" - -3.0\n")
    for values in ([1.0], [1.0, 2.0, 3.0], [1.0, math.inf], [math.nan, 0.0]):
        with pytest.raises(ValueError, match="2 numbers"):
            with_literals(policy, values)
        with pytest.raises(ValueError, match="2 numbers"):
            with_constants(compile_policy(policy), values)


@given(POLICIES)
@settings(max_examples=60, **SETTINGS)
def test_jumps_go_forward_and_inputs_are_never_written(source):
    policy = verify(source)
    program = compile_policy(policy)
    first_temporary = FIRST_CONSTANT + program.constants
    for at, (op, target, a, b) in enumerate(program.code):
        assert 0 <= a < len(program.registers)
        assert 0 <= b < len(program.registers)
        if op >= 17:
            assert at < target < len(program.code)
        elif op > 0:
            assert first_temporary <= target < len(program.registers)
