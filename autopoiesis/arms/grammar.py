"""The policy language as a grammar, for engines that constrain what they decode.

It is narrower than the language, so that what it lets through verifies: locals are called a, b, c ...
in the order in which they are assigned, ifs do not nest, and brackets nest twice. Every human arm
can be written in it. The notation is the EBNF of xgrammar and llama.cpp.
"""

from collections.abc import Iterator
from functools import cache

from autopoiesis.arms.features import FUNCTIONS, INPUTS
from autopoiesis.arms.language import CALLS, COMPARISONS, OPERATORS

LOCALS = "abcdefg"
"""Names of locals, in the order in which a function assigns them."""
MOST_LOCALS = {3: 7, 2: 3}
"""Locals of a function, by the number of its parameters."""
TERMS, FACTORS = (2, 3, 6), (2, 3, 3)
"""Most terms of a sum and factors of a term, inside two brackets, one, and none."""
MOST_ARGUMENTS = 3
GUARDS, BRANCHES, CLAUSES = 3, 1, 1
"""Most ifs before an assignment or return, elifs of an if, and further comparisons of a condition."""

_TOP = len(TERMS) - 1
_SUMS = {"+", "-"}
_JUNCTION = '(" and " | " or ")'


@cache
def policy_grammar() -> str:
    """Return the EBNF; `root` is a whole policy, with what its author says of it as a comment."""
    rules = [_root()]
    rules.append('thought ::= "# " [a-zA-Z0-9 ,.<>()/-]{1,80} "\\n"')
    rules.append('number ::= ("0" | [1-9] [0-9]{0,6}) ("." [0-9]{1,4})?')
    for parameter, (declared, _) in INPUTS.items():
        fields = _any(f'"{parameter}.{field}"' for field in declared._fields)
        rules.append(f"{parameter} ::= {fields}")
    signs = [sign for sign, *_ in OPERATORS.values()]
    rules.append(f"plus ::= {_any(_spaced(s) for s in signs if s in _SUMS)}")
    rules.append(f"times ::= {_any(_spaced(s) for s in signs if s not in _SUMS)}")
    rules.append(f"compares ::= {_any(map(_spaced, COMPARISONS.values()))}")
    for arity in dict.fromkeys(CALLS.values()):
        names = _any(f'"{name}"' for name, takes in CALLS.items() if takes == arity)
        rules.append(f"{_arity(*arity)} ::= {names}")
    for name, parameters in FUNCTIONS.items():
        rules.append(
            f'{name} ::= "def {name}({", ".join(parameters)}):\\n" {_scope(parameters, 0)}_body'
        )
    for parameters in dict.fromkeys(FUNCTIONS.values()):
        for known in range(MOST_LOCALS[len(parameters)] + 1):
            rules += _rules_of_scope(parameters, known)
    return "\n".join(rules) + "\n"


def _root() -> str:
    required, *others = FUNCTIONS
    return f"root ::= thought? {required} " + " ".join(f'("\\n" {name})?' for name in others)


def _scope(parameters: tuple[str, ...], known: int) -> str:
    """Return the prefix of the rules for functions of these parameters with `known` locals assigned."""
    return f"of{len(parameters)}_{known}"


def _rules_of_scope(parameters: tuple[str, ...], known: int) -> Iterator[str]:
    x = _scope(parameters, known)
    local = f"[{LOCALS[0]}-{LOCALS[known - 1]}]" if known else ""
    yield f"{x}_atom ::= {' | '.join(['number', *parameters, *([local] if known else [])])}"
    yield f'{x}_factor0 ::= "-"? {x}_atom'
    for depth in range(_TOP + 1):
        if depth:
            yield f"{x}_call{depth} ::= {_any(_calls(f'{x}_sum{depth - 1}'))}"
            inner = f'{x}_atom | {x}_call{depth} | "(" {x}_sum{depth - 1} ")"'
            yield f'{x}_factor{depth} ::= "-"? ({inner})'
        yield f"{x}_term{depth} ::= {_chain(f'{x}_factor{depth}', 'times', FACTORS[depth])}"
        yield f"{x}_sum{depth} ::= {_chain(f'{x}_term{depth}', 'plus', TERMS[depth])}"
    yield f'{x}_comparison ::= "not "? {x}_sum1 compares {x}_sum1'
    yield f"{x}_condition ::= {_chain(f'{x}_comparison', _JUNCTION, CLAUSES + 1)}"
    value = f"{x}_sum{_TOP}"
    yield f'{x}_value ::= {value} (" if " {x}_condition " else " {value})?'
    assign = f'"        " {local} " = " {x}_value "\\n"' if known else ""
    deed = f'"        return " {x}_value "\\n"' + (f" | {assign}" if known else "")
    yield f"{x}_deed ::= {deed}"
    otherwise = f' ("    else:\\n" {assign})?' if known else ""
    branches = f'("    elif " {x}_condition ":\\n" {x}_deed){{0,{BRANCHES}}}'
    yield f'{x}_guard ::= "    if " {x}_condition ":\\n" {x}_deed {branches}{otherwise}'
    ends = [f'"    return " {x}_value "\\n"']
    if known < MOST_LOCALS[len(parameters)]:
        ends.append(
            f'"    {LOCALS[known]} = " {x}_value "\\n" {_scope(parameters, known + 1)}_body'
        )
    yield f"{x}_body ::= {x}_guard{{0,{GUARDS}}} ({' | '.join(ends)})"


def _calls(argument: str) -> Iterator[str]:
    """Return the calls of each arity."""
    for fewest, most in dict.fromkeys(CALLS.values()):
        more = min(most, MOST_ARGUMENTS) - 1
        others = f' (", " {argument}){{{fewest - 1},{more}}}' if more else ""
        yield f'{_arity(fewest, most)} "(" {argument}{others} ")"'


def _arity(fewest: int, most: int) -> str:
    return f"takes{fewest}_{most}"


def _chain(part: str, joint: str, most: int) -> str:
    return f"{part} ({joint} {part}){{0,{most - 1}}}"


def _spaced(sign: str) -> str:
    return f'" {sign} "'


def _any(alternatives: Iterator[str]) -> str:
    return " | ".join(alternatives)
