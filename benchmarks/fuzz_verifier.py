"""Coverage-guided fuzzing of the policy verifier, for as long as you like.

    pip install atheris          # needs Python 3.11 or 3.12
    python benchmarks/fuzz_verifier.py CORPUS_DIR -max_total_time=3600 -max_len=6000

Stops at the first input that crashes the verifier, takes over 50 ms of CPU time, or is accepted
though `allowed`, which shares no code with the verifier, finds something outside the grammar in
its canonical form. The corpus begins with the seed arms; libFuzzer keeps what it finds in CORPUS_DIR.
"""

import ast
import contextlib
import re
import sys
import time
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["autopoiesis.arms.language", "autopoiesis.arms.lexis"]):
    from autopoiesis.arms.language import PolicyError, verify

from autopoiesis.arms.features import Fleet, Replica, Request
from autopoiesis.arms.seeds import seed_arms

LIMIT_S = 0.05
FIELDS = {
    "request": set(Request._fields),
    "replica": set(Replica._fields),
    "fleet": set(Fleet._fields),
}
PARAMETERS = {
    "score": ["request", "replica", "fleet"],
    "admit": ["request", "fleet"],
    "priority": ["request", "fleet"],
    "ceiling": ["request", "replica", "fleet"],
}
CALLS = {"min", "max", "abs", "sqrt", "exp", "log", "floor", "ceil", "clip"}
STATEMENTS = (ast.Return, ast.Assign, ast.If)
CONDITIONS = (ast.Compare, ast.BoolOp)
CANONICAL = re.compile(r"[A-Za-z0-9_ .,:()+\-*/%<>=!\n]*")


def allowed(source: str) -> bool:
    """Tell whether canonical source holds nothing but the grammar of docs/policy-language.md."""
    tree = ast.parse(source)
    return (
        CANONICAL.fullmatch(source) is not None
        and all(isinstance(node, ast.FunctionDef) and _function(node) for node in tree.body)
        and "score" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    )


def _function(node: ast.FunctionDef) -> bool:
    a = node.args
    plain = not (
        a.posonlyargs or a.kwonlyargs or a.vararg or a.kwarg or a.defaults or a.kw_defaults
    )
    unadorned = (
        plain
        and not node.decorator_list
        and not node.returns
        and not any(x.annotation for x in a.args)
    )
    return (
        unadorned
        and [x.arg for x in a.args] == PARAMETERS.get(node.name)
        and all(_statement(s, set(PARAMETERS[node.name])) for s in node.body)
    )


def _statement(node: ast.stmt, parameters: set[str]) -> bool:
    if isinstance(node, ast.Return):
        return node.value is not None and _value(node.value, parameters)
    if isinstance(node, ast.Assign):
        target = node.targets[0]
        named = len(node.targets) == 1 and isinstance(target, ast.Name)
        return (
            named
            and target.id not in parameters | CALLS | set(PARAMETERS)
            and _value(node.value, parameters)
        )
    return (
        isinstance(node, ast.If)
        and _condition(node.test, parameters)
        and all(_statement(s, parameters) for s in [*node.body, *node.orelse])
    )


def _condition(node: ast.expr, parameters: set[str]) -> bool:
    match node:
        case ast.BoolOp(values=values):
            return all(_condition(v, parameters) for v in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _condition(operand, parameters)
        case ast.Compare(left=left, ops=ops, comparators=right):
            known = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
            return all(isinstance(op, known) for op in ops) and all(
                _value(v, parameters) for v in [left, *right]
            )
    return False


def _value(node: ast.expr, parameters: set[str]) -> bool:
    match node:
        case ast.Constant(value=value):
            return type(value) is float
        case ast.Name(id=name):
            return name not in parameters
        case ast.Attribute(value=ast.Name(id=name), attr=field):
            return name in parameters and field in FIELDS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _value(operand, parameters)
        case ast.BinOp(left=left, op=op, right=right):
            known = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Mod, ast.Pow)
            return isinstance(op, known) and _value(left, parameters) and _value(right, parameters)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return (
                _condition(test, parameters)
                and _value(body, parameters)
                and _value(orelse, parameters)
            )
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return name in CALLS and all(_value(x, parameters) for x in args)
    return False


def one_input(data: bytes) -> None:
    """Verify one input; raise if the verifier did anything but accept or refuse it in time."""
    started_s = time.process_time()
    policy, refusal = None, ""
    try:
        policy = verify(data)
    except PolicyError as error:
        refusal = str(error)
    took_s = time.process_time() - started_s
    if policy is None:
        assert refusal, "a refusal says why"
        assert "\n" not in refusal, "a refusal is one sentence"
        _in_time(took_s, data)
        return
    assert allowed(policy.source), policy.source
    assert verify(policy.source) == policy, policy.source
    _in_time(took_s, data)


def _in_time(took_s: float, data: bytes) -> None:
    """Forgive a time over the limit that does not repeat: another process may have disturbed it."""
    for _ in range(3):
        if took_s <= LIMIT_S:
            return
        started_s = time.process_time()
        with contextlib.suppress(PolicyError):
            verify(data)
        took_s = time.process_time() - started_s
    raise AssertionError(f"verifying took {took_s * 1e3:.0f} ms of CPU time")


def main() -> None:
    warnings.simplefilter("ignore")
    corpus = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    if not corpus:
        sys.exit("give a directory for the corpus")
    corpus[0].mkdir(parents=True, exist_ok=True)
    for arm in seed_arms():
        (corpus[0] / f"seed-{arm.name}").write_text(arm.source, "utf-8")
    dictionary = corpus[0].parent / "policy.dict"
    words = [
        *CALLS,
        *PARAMETERS,
        "request.",
        "replica.",
        "fleet.",
        "def ",
        "return ",
        "    ",
        " if ",
        " else ",
    ]
    words += [field for fields in FIELDS.values() for field in fields]
    dictionary.write_text("".join(f'"{word}"\n' for word in words), "utf-8")
    atheris.Setup([*sys.argv, f"-dict={dictionary}"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
