"""Typed operators on policies: each changes a tree in place, or says that it found nothing to do.

Values stay values and conditions stay conditions; whether the result is a policy is for the
verifier to say.
"""

import ast
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autopoiesis.arms.features import FUNCTIONS
from autopoiesis.synthesis import vocabulary as v

Tree = ast.Module
Operator = Callable[[Tree, Sequence[Tree], np.random.Generator], bool]
"""(policy, other policies, randomness) → whether it changed the policy."""

_CONDITIONS = (ast.Compare, ast.BoolOp)


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a function where a value stands."""

    function: str
    owner: ast.AST
    field: str
    index: int | None

    @property
    def value(self) -> ast.expr:
        """The expression that stands there."""
        held = getattr(self.owner, self.field)
        return held if self.index is None else held[self.index]

    def put(self, value: ast.expr) -> None:
        """Put another expression there."""
        if self.index is None:
            setattr(self.owner, self.field, value)
        else:
            getattr(self.owner, self.field)[self.index] = value


def functions(tree: Tree) -> dict[str, ast.FunctionDef]:
    """Return the policy's functions by name."""
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def sites(tree: Tree) -> list[Site]:
    """Return every place where a value stands, in source order."""
    return [
        site
        for name, node in functions(tree).items()
        for statement in node.body
        for site in _within(name, statement)
    ]


def _within(function: str, owner: ast.AST) -> Iterator[Site]:
    if isinstance(owner, ast.Attribute):
        return
    for field, held in ast.iter_fields(owner):
        children = list(enumerate(held)) if isinstance(held, list) else [(None, held)]
        for index, child in children:
            if not isinstance(child, ast.AST) or (isinstance(owner, ast.Call) and field == "func"):
                continue
            if _is_value(child):
                yield Site(function, owner, field, index)
            yield from _within(function, child)


def _is_value(node: ast.AST) -> bool:
    if not isinstance(node, ast.expr) or isinstance(node, _CONDITIONS):
        return False
    if isinstance(node, ast.UnaryOp):
        return not isinstance(node.op, ast.Not)
    return not isinstance(getattr(node, "ctx", None), ast.Store)


def _is_closed(node: ast.AST, function: str) -> bool:
    """Whether an expression reads nothing but the function's own parameters."""
    calls = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in calls}
    return names <= set(v.parameters(function))


def _pick(found: Sequence[Site], rng: np.random.Generator) -> Site | None:
    return v.choose(found, rng) if found else None


def _feature(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return None


def _constant(node: ast.AST) -> float | None:
    return (
        float(node.value)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        else None
    )


def perturb_constant(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Scale a number: mostly a little, sometimes by ten, seldom to its negative."""
    site = _pick([s for s in sites(tree) if _constant(s.value) is not None], rng)
    if site is None:
        return False
    old = _constant(site.value) or 0.0
    kind = rng.random()
    if old == 0.0:
        new = float(rng.normal())
    elif kind < 0.8:
        new = old * float(rng.lognormal(0.0, 0.4))
    elif kind < 0.97:
        new = old * float(10.0 ** rng.uniform(-1.5, 1.5))
    else:
        new = -old
    site.put(v.number(new))
    return True


def perturb_constants(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Scale every number a little: a step of a random search over the constants."""
    found = [s for s in sites(tree) if _constant(s.value)]
    for site in found:
        site.put(v.number((_constant(site.value) or 0.0) * float(rng.lognormal(0.0, 0.25))))
    return bool(found)


def replace_feature(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Read another feature of the same unit."""
    site = _pick([s for s in sites(tree) if _feature(s.value) in v.UNIT_OF], rng)
    if site is None:
        return False
    old = _feature(site.value) or ""
    usable = set(v.available(site.function))
    rivals = [name for name in v.UNITS[v.UNIT_OF[old]] if name != old and name in usable]
    if not rivals:
        return False
    site.put(v.expression(v.choose(rivals, rng)))
    return True


def insert_term(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:
    """Add a weighted term, a known one or one from another policy, to a returned value."""
    site = _pick(_returned(tree), rng)
    if site is None:
        return False
    # The size of the sum is unknown, so the term's may span orders of magnitude.
    scale = float(10.0 ** rng.uniform(-2.0, 3.0)) if rng.random() < 0.5 else 1.0
    term = v.random_term(site.function, rng, scale)
    if others and rng.random() < 0.3:
        other = v.choose(others, rng)
        donor = _pick([s for s in _returned(other) if _is_closed(s.value, site.function)], rng)
        if donor is not None:
            weight = v.number(scale * float(rng.lognormal(0.0, 1.0)))
            term = ast.BinOp(weight, ast.Mult(), copy.deepcopy(donor.value))
    site.put(ast.BinOp(site.value, ast.Add(), term))
    return True


def _returned(tree: Tree) -> list[Site]:
    return [s for s in sites(tree) if isinstance(s.owner, ast.Return)]


def remove_term(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Leave one operand of an operation."""
    site = _pick([s for s in sites(tree) if isinstance(s.value, ast.BinOp)], rng)
    if site is None or not isinstance(site.value, ast.BinOp):
        return False
    site.put(site.value.left if rng.random() < 0.5 else site.value.right)
    return True


def wrap(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Bound a value, or turn it into a ratio, a product, a logarithm or a root."""
    site = _pick([s for s in sites(tree) if not isinstance(s.value, ast.Constant)], rng)
    if site is None:
        return False
    unit = v.UNIT_OF.get(_feature(site.value) or "", "requests")
    bound = v.number(v.USUAL[unit] * float(rng.lognormal(0.0, 0.8)))
    ratios = [name for name in v.UNITS["ratio"] if name in v.available(site.function)]
    ratio = v.expression(ratios[0] if rng.random() < 0.8 else v.choose(ratios, rng))
    old = site.value
    made: list[ast.expr] = [
        ast.BinOp(old, ast.Div(), ratio),
        ast.BinOp(old, ast.Div(), ratio),
        ast.BinOp(old, ast.Mult(), ratio),
        _call("max", old, bound),
        _call("min", old, bound),
        _call("min", _call("max", old, v.number(0.0)), bound),
        _call("log", ast.BinOp(v.number(1.0), ast.Add(), _call("max", old, v.number(0.0)))),
        _call("sqrt", old),
        ast.BinOp(old, ast.Mult(), copy.deepcopy(old)),
    ]
    site.put(v.choose(made, rng))
    return True


def _call(name: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def swap_subtree(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:
    """Take over a part of another policy in place of one of its own."""
    if not others:
        return False
    site = _pick(sites(tree), rng)
    if site is None:
        return False
    other = v.choose(others, rng)
    fitting = [s for s in sites(other) if _is_closed(s.value, site.function)]
    same = [s for s in fitting if s.function == site.function]
    donor = _pick(same or fitting, rng)
    if donor is None:
        return False
    site.put(copy.deepcopy(donor.value))
    return True


def graft_function(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:
    """Take over a whole function of another policy."""
    if not others:
        return False
    theirs = functions(v.choose(others, rng))
    mine = functions(tree)
    names = [
        name
        for name in theirs
        if name not in mine or ast.dump(theirs[name]) != ast.dump(mine[name])
    ]
    if not names:
        return False
    _install(tree, copy.deepcopy(theirs[v.choose(names, rng)]))
    return True


def add_guard(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:
    """Return something else where a feature exceeds a number."""
    site = _pick(_returned(tree), rng)
    if site is None:
        return False
    features = [name for name in v.available(site.function) if v.UNIT_OF[name] != "index"]
    feature = v.choose(features, rng)
    limit = v.number(v.USUAL[v.UNIT_OF[feature]] * float(rng.lognormal(0.0, 0.8)))
    donors = [s for o in others for s in _returned(o) if s.function == site.function]
    donor = _pick([s for s in donors if _is_closed(s.value, site.function)], rng)
    if donor is not None and rng.random() < 0.5:
        otherwise = copy.deepcopy(donor.value)
    else:
        extra = v.random_term(site.function, rng, float(10.0 ** rng.uniform(-1.0, 2.0)))
        otherwise = ast.BinOp(copy.deepcopy(site.value), ast.Add(), extra)
    condition = ast.Compare(v.expression(feature), [ast.Gt()], [limit])
    site.put(ast.IfExp(condition, otherwise, site.value))
    return True


def fresh_function(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Write a function anew; what is said of held requests comes with the ceiling that holds them."""
    name = ("score", "score", "score", "admit", "priority", "ceiling")[rng.integers(6)]
    _install(tree, v.random_function(name, rng))
    if name in {"admit", "priority"} and "ceiling" not in functions(tree):
        _install(tree, v.random_function("ceiling", rng))
    return True


def queue_discipline(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Write anew at once who is refused, who waits and in what order: one without the others does little."""
    _install(tree, v.random_function("ceiling", rng))
    if rng.random() < 0.8:
        _install(tree, v.random_function("admit", rng))
    if rng.random() < 0.6:
        _install(tree, v.define("priority", v.deadline_order(rng)))
    return True


def simplify(tree: Tree, others: Sequence[Tree], rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Drop an optional function, or a branch."""
    optional = [name for name in functions(tree) if name != "score"]
    branches = [s for s in sites(tree) if isinstance(s.value, ast.IfExp)]
    if optional and (not branches or rng.random() < 0.5):
        gone = functions(tree)[v.choose(optional, rng)]
        tree.body.remove(gone)
        return True
    site = _pick(branches, rng)
    if site is None or not isinstance(site.value, ast.IfExp):
        return False
    site.put(site.value.body if rng.random() < 0.5 else site.value.orelse)
    return True


def _install(tree: Tree, function: ast.FunctionDef) -> None:
    present = functions(tree) | {function.name: function}
    tree.body = [present[name] for name in FUNCTIONS if name in present]


OPERATORS: tuple[tuple[float, str, Operator], ...] = (
    (3.0, "scaled a number", perturb_constant),
    (2.0, "scaled the numbers", perturb_constants),
    (2.0, "read another feature", replace_feature),
    (4.0, "added a term", insert_term),
    (1.5, "removed a term", remove_term),
    (2.5, "wrapped a value", wrap),
    (2.0, "took over a part", swap_subtree),
    (1.5, "took over a function", graft_function),
    (1.5, "added a guard", add_guard),
    (2.0, "wrote a function anew", fresh_function),
    (2.5, "wrote a queue discipline", queue_discipline),
    (1.0, "simplified", simplify),
)
"""(weight, what it did, operator)"""
