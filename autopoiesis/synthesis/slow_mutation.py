"""Variation of slow policies: triggers and planners change partners, numbers move, conditions join.

A slow policy's text falls into pieces, its top-level functions and constants. What a trigger or a planner needs is
found by name, so either can be taken into another policy with all that it calls.
"""

import ast
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import numpy as np

from autopoiesis.arms.lexis import PolicyError
from autopoiesis.arms.slow import MAX_SLOW_BYTES, SlowPolicy, verify_slow
from autopoiesis.synthesis.climbing import CLIMBING
from autopoiesis.synthesis.staging import INNER, STAGED

LARGEST_BYTES = MAX_SLOW_BYTES // 2
"""Longer policies are not proposed: people should be able to read what wins."""
SIGNALS = (
    ("window.utilisation", 1.0),
    ("window.held_mean", 4.0),
    ("window.kv_usage_mean", 0.9),
    ("window.arrival_rate_change", 1.5),
    ("window.ttft_p99_s / window.slo_ttft_s", 1.0),
    ("window.tpot_p99_s / window.slo_tpot_s", 1.0),
    ("1.0 - window.utility", 0.1),
    ("float(fleet.lost)", 0.5),
)
"""What a trigger may watch, each with its usual size."""
TRIGGER, PLANNER = "should_reschedule", "schedule"
SEQS, TOKENS = ("MAX_SEQS", 256, (32, 1024)), ("MAX_TOKENS", 8192, (1024, 16384))
"""Batch limits of all replicas: the constant's name, what a plan has without one, and the bounds."""
_LIMITED = """
PLAIN = ReplicaGroup
MAX_SEQS = 256
MAX_TOKENS = 8192
def ReplicaGroup(model, gpu, width, replicas, seqs=0, tokens=0, share=1.0):
    return PLAIN(model, gpu, width, replicas, MAX_SEQS, MAX_TOKENS, share=share)
"""
"""Stands before a planner, so that it need not know of limits."""

Rng = np.random.Generator
Named = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def vary_slow(
    text: str,
    mates: Sequence[str],
    rng: Rng,
    operators: "Sequence[tuple[str, Operator]] | None" = None,
) -> tuple[SlowPolicy, str] | None:
    """Return a varied slow policy and what was done to it; None where nothing could be, or it does not verify.

    Without `operators`, all are used.
    """
    made: str | None = None
    done = ""
    known = operators or OPERATORS
    for i in rng.permutation(len(known)):
        done, operator = known[i]
        made = operator(text, mates, rng)
        if made is not None and ast.dump(ast.parse(made)) != ast.dump(ast.parse(text)):
            break
        made = None
    if made is None or len(made) > LARGEST_BYTES:
        return None
    with suppress(PolicyError):
        return verify_slow(made), done
    return None


# --- pieces -----------------------------------------------------------------------------------------


def _imports(tree: ast.Module) -> list[ast.stmt]:
    return [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def _pieces(tree: ast.Module) -> dict[str, Named]:
    """Return the top-level functions, classes and constants by name."""
    found: dict[str, Named] = {}
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = node
            case _:
                pass
    return found


def _needed(name: str, pieces: dict[str, Named], without: frozenset[str] = frozenset()) -> set[str]:
    """Return the names of the pieces that a piece needs, itself among them."""
    needed: set[str] = set()
    open_ = [name]
    while open_:
        at = open_.pop()
        if at in needed or at not in pieces or at in without:
            continue
        needed.add(at)
        open_ += [node.id for node in ast.walk(pieces[at]) if isinstance(node, ast.Name)]
    return needed


class _Renamed(ast.NodeTransformer):
    """Gives names other names."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        """Rename a use or an assignment."""
        return ast.Name(self._names.get(node.id, node.id), node.ctx)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Rename a definition, and what it uses."""
        self.generic_visit(node)
        node.name = self._names.get(node.name, node.name)
        return node


def _text(imports: Iterable[ast.stmt], pieces: Iterable[ast.stmt]) -> str:
    """Write pieces down, each import once, constants first."""
    once = dict.fromkeys(ast.unparse(node) for node in imports)
    ordered = sorted(pieces, key=lambda node: isinstance(node, ast.FunctionDef | ast.ClassDef))
    body = [ast.unparse(ast.fix_missing_locations(node)) for node in ordered]
    return "\n".join([*once, *body]) + "\n"


def _composed(trigger: ast.Module, planner: ast.Module) -> str:
    """Return a policy with one's trigger and the other's planner; what they call alike is kept apart."""
    triggers, planners = _pieces(trigger), _pieces(planner)
    plans = _needed(PLANNER, planners)
    asks = _needed(TRIGGER, triggers, frozenset({PLANNER}))
    taken = plans | asks
    names = {
        name: _free(name, taken)
        for name in asks & plans
        if ast.dump(triggers[name]) != ast.dump(planners[name])
    }
    rename = _Renamed(names)
    kept = [
        rename.visit(triggers[name]) for name in triggers if name in asks - plans or name in names
    ]
    return _text(
        [*_imports(planner), *_imports(trigger)],
        [*(planners[name] for name in planners if name in plans), *kept],
    )


def _free(name: str, taken: set[str]) -> str:
    number = next(n for n in range(2, 1000) if f"{name}_{n}" not in taken)
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"


# --- operators --------------------------------------------------------------------------------------


def _one_of(mates: Sequence[str], rng: Rng) -> str:
    return mates[int(rng.integers(len(mates)))]


def _other_trigger(text: str, mates: Sequence[str], rng: Rng) -> str | None:
    if not mates:
        return None
    mate = _one_of(mates, rng)
    return _composed(ast.parse(mate), ast.parse(text))


def _other_planner(text: str, mates: Sequence[str], rng: Rng) -> str | None:
    if not mates:
        return None
    mate = _one_of(mates, rng)
    return _composed(ast.parse(text), ast.parse(mate))


def _numbers(text: str, _mates: Sequence[str], rng: Rng) -> str | None:
    """Scale one or two of the numbers that somebody chose: constants, and what things are compared with."""
    tree = ast.parse(text)
    chosen = [
        node
        for name, piece in _pieces(tree).items()
        if name not in {SEQS[0], TOKENS[0]}
        for node in _chosen_numbers(piece)
        if type(node.value) in {int, float} and node.value not in (0, 1)
    ]
    if not chosen:
        return None
    for i in rng.choice(len(chosen), min(int(rng.integers(1, 3)), len(chosen)), replace=False):
        node = chosen[i]
        assert isinstance(node.value, int | float)
        scaled = float(node.value) * float(np.exp(0.5 * rng.standard_normal()))
        if type(node.value) is int:
            node.value = max(round(scaled), 1)
        else:
            node.value = float(f"{scaled:.3g}")
    return _text(_imports(tree), _pieces(tree).values())


def _chosen_numbers(piece: Named) -> list[ast.Constant]:
    if isinstance(piece, ast.Assign | ast.AnnAssign):
        return [piece.value] if isinstance(piece.value, ast.Constant) else []
    return [
        side
        for node in ast.walk(piece)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Constant)
    ]


def _limits(text: str, _mates: Sequence[str], rng: Rng) -> str | None:
    """Double or halve a batch limit of all replicas: few values, because each has its speed measured."""
    tree = ast.parse(text)
    pieces = _pieces(tree)
    if SEQS[0] not in pieces:
        pieces = _pieces(ast.parse(_LIMITED)) | pieces
    name, usual, (low, high) = SEQS if rng.random() < 0.5 else TOKENS
    held = pieces[name]
    assert isinstance(held, ast.Assign)
    value = held.value.value if isinstance(held.value, ast.Constant) else usual
    assert isinstance(value, int)
    moved = min(max(value * 2 if rng.random() < 0.6 else value // 2, low), high)
    held.value = ast.Constant(moved)
    return _text(_imports(tree), pieces.values())


def _staged(text: str, _mates: Sequence[str], _rng: Rng) -> str | None:
    """Let the planner's new plan be taken over only on those types of GPU where it pays."""
    return _around(text, STAGED)


def _climbing(text: str, _mates: Sequence[str], _rng: Rng) -> str | None:
    """Let what runs and the planner's new plan be improved replica by replica, and the better be taken."""
    return _around(text, CLIMBING)


def _climbing_ahead(text: str, _mates: Sequence[str], _rng: Rng) -> str | None:
    """The same by what will have come within a minute as well, and no better than to keep up with that."""
    return _around(text, CLIMBING.replace("AHEAD_S = 0.0", "AHEAD_S = 60.0"))


def _around(text: str, wrapping: str) -> str | None:
    """Put the planner inside another that asks it, in place of one that it stands in; None if names collide.

    The trigger stays, unless the other has its own.
    """
    tree, around = ast.parse(text), ast.parse(wrapping)
    pieces, theirs = _pieces(tree), _pieces(around)
    inner = INNER if INNER in pieces else PLANNER
    kept = _needed(inner, pieces)
    if TRIGGER not in theirs:
        kept |= _needed(TRIGGER, pieces, frozenset({PLANNER}))
    pieces = {name: piece for name, piece in pieces.items() if name in kept}
    pieces[INNER] = _Renamed({PLANNER: INNER}).visit(pieces.pop(inner))
    if pieces.keys() & theirs.keys():
        return None
    return _text([*_imports(tree), *_imports(around)], [*pieces.values(), *theirs.values()])


def _joined(text: str, mates: Sequence[str], rng: Rng) -> str | None:
    """Have two triggers decide together."""
    if not mates:
        return None
    mate = ast.parse(_one_of(mates, rng))
    tree = ast.parse(text)
    pieces = _pieces(tree)
    theirs = _pieces(mate)
    asks = _needed(TRIGGER, theirs, frozenset({PLANNER}))
    taken = {*pieces, *asks}
    first, names = _free("trigger", taken), {name: _free(name, taken) for name in asks}
    second = names[TRIGGER]
    own = _Renamed({TRIGGER: first})
    other = _Renamed(names)
    word = "or" if rng.random() < 0.6 else "and"
    both = ast.parse(
        f"def {TRIGGER}(window, fleet, plan):\n    if not plan.groups:\n        return True\n"
        f"    return {first}(window, fleet, plan) {word} {second}(window, fleet, plan)\n"
    )
    return _text(
        [*_imports(tree), *_imports(mate)],
        [
            *(own.visit(piece) for piece in pieces.values()),
            *(other.visit(theirs[name]) for name in theirs if name in asks),
            *both.body,
        ],
    )


def _watch(text: str, _mates: Sequence[str], rng: Rng) -> str | None:
    """Let the trigger act on one more sign of trouble."""
    signal, usual = SIGNALS[rng.integers(len(SIGNALS))]
    bound = float(f"{usual * float(np.exp(0.4 * rng.standard_normal())):.3g}")
    return _with_first_lines(text, f"if {signal} > {bound}:\n    return True")


def _cool_down(text: str, _mates: Sequence[str], rng: Rng) -> str | None:
    """Keep the trigger quiet for some windows after a change."""
    wait = int(rng.integers(1, 13))
    return _with_first_lines(
        text,
        f"if plan.groups and fleet.lost == 0 and window.windows_since_rescheduling < {wait}:\n    return False",
    )


def _with_first_lines(text: str, lines: str) -> str:
    tree = ast.parse(text)
    trigger = _pieces(tree)[TRIGGER]
    assert isinstance(trigger, ast.FunctionDef)
    trigger.body[:0] = ast.parse(lines).body
    return _text(_imports(tree), _pieces(tree).values())


Operator = Callable[[str, Sequence[str], Rng], str | None]
OPERATORS: tuple[tuple[str, Operator], ...] = (
    ("another trigger", _other_trigger),
    ("another planner", _other_planner),
    ("other numbers", _numbers),
    ("two triggers", _joined),
    ("one more signal", _watch),
    ("a pause after changes", _cool_down),
    ("other batch limits", _limits),
    ("in stages", _staged),
    ("replica by replica", _climbing),
    ("replica by replica, for what is to come", _climbing_ahead),
)
"""What can be done to a slow policy."""
NUMERIC = tuple(known for known in OPERATORS if known[1] in {_numbers, _limits})
"""What leaves its structure as it is: tuning."""
WRAPPING = tuple(known for known in OPERATORS if known[1] in {_staged, _climbing})
"""What decides how far a planner's new plan goes."""
