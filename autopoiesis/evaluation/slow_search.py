"""A search over slow policies: triggers and planners recombined, their numbers and limits varied.

A genome is a policy of the seeds' parts: which trigger, which planner, the constants at their top,
and the batch limits that replicas get. It is written out as text and verified like any other policy.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from autopoiesis.arms.migration import Order
from autopoiesis.arms.seeds import SLOW_SEEDS, slow_seed_text
from autopoiesis.arms.slow import verify_slow
from autopoiesis.evaluation.total_time import Loaded, loaded

_CONSTANT = re.compile(r"^([A-Z][A-Z_]*) = ([0-9.]+)$", re.MULTILINE)
_LIMITS = """\
Limited = ReplicaGroup


def ReplicaGroup(model, gpu, width, replicas, seqs=0, tokens=0, share=1.0):
    return Limited(model, gpu, width, replicas, {seqs}, {tokens}, share=share)


"""
SEQS, TOKENS = (32, 1024), (1024, 16384)
"""Bounds of `max_num_seqs` and of `max_num_batched_tokens`."""
DEFAULT_SEQS, DEFAULT_TOKENS = 256, 8192
SPREAD = 0.5
"""Standard deviation of a number's logarithm when it is varied."""
RECOMBINED, VARIED = 0.4, 0.7
"""Chances that a child gets another trigger or planner, and that each of its numbers is varied."""
SOURCE_NAMES = {"full-migration": Order.FULL}
"""Seeds whose changes stop everything: the paper's full migration."""


@dataclass(frozen=True, slots=True)
class Genome:
    """One slow policy, as what it is made of."""

    trigger: str
    planner: str
    numbers: tuple[tuple[str, float], ...] = ()
    """Constants that differ from the seeds', by name."""
    seqs: int = DEFAULT_SEQS
    tokens: int = DEFAULT_TOKENS
    order: Order = Order.MINIMAL

    @property
    def name(self) -> str:
        """What it is, for people."""
        told = [f"{self.trigger}+{self.planner}", *(f"{n}={v:g}" for n, v in self.numbers)]
        if (self.seqs, self.tokens) != (DEFAULT_SEQS, DEFAULT_TOKENS):
            told.append(f"{self.seqs} seqs, {self.tokens} tokens")
        return " ".join(told)

    def source(self) -> str:
        """Write the policy."""
        text = slow_seed_text(self.trigger, self.planner)
        for name, value in self.numbers:
            text = re.sub(rf"^{name} = .*$", f"{name} = {value:g}", text, flags=re.MULTILINE)
        if (self.seqs, self.tokens) != (DEFAULT_SEQS, DEFAULT_TOKENS):
            # Imports of the planner stay first; the limits stand before its first function.
            text = text.replace(
                "def schedule",
                _LIMITS.format(seqs=self.seqs, tokens=self.tokens) + "def schedule",
                1,
            )
        return text


@cache
def policy_of(genome: Genome) -> Loaded:
    """Return the genome's functions."""
    return loaded(verify_slow(genome.source()), genome.name, genome.order)


def seeds() -> dict[str, Genome]:
    """Return the slow seeds that people wrote, by name."""
    return {
        name: Genome(trigger, planner, order=SOURCE_NAMES.get(name, Order.MINIMAL))
        for name, (trigger, planner) in SLOW_SEEDS.items()
    }


def numbers_of(trigger: str, planner: str) -> dict[str, float]:
    """Return the constants at the top of the two parts."""
    return {n: float(v) for n, v in _CONSTANT.findall(slow_seed_text(trigger, planner))}


def varied(genome: Genome, rng: np.random.Generator) -> Genome:
    """Return the genome with other numbers and limits; what it consists of stays."""
    own = dict(genome.numbers)
    for name, value in numbers_of(genome.trigger, genome.planner).items():
        if rng.random() < VARIED:
            moved = own.get(name, value) * float(np.exp(SPREAD * rng.standard_normal()))
            whole = name.endswith("_WINDOWS")
            own[name] = float(max(round(moved), 1)) if whole else float(f"{moved:.3g}")
    seqs, tokens = genome.seqs, genome.tokens
    if rng.random() < VARIED:
        seqs = _step(seqs, SEQS, rng)
    if rng.random() < VARIED:
        tokens = _step(tokens, TOKENS, rng)
    return replace(genome, numbers=tuple(sorted(own.items())), seqs=seqs, tokens=tokens)


def _step(value: int, bounds: tuple[int, int], rng: np.random.Generator) -> int:
    """Double or halve within bounds: few values, because each has its rates measured."""
    low, high = bounds
    return int(np.clip(value * 2 if rng.random() < 0.5 else value // 2, low, high))


def child(parents: Sequence[Genome], rng: np.random.Generator) -> Genome:
    """Breed from the population: a parent's parts, perhaps another's trigger or planner, varied."""
    first, second = (parents[int(i)] for i in rng.integers(len(parents), size=2))
    made = first
    if rng.random() < RECOMBINED:
        made = replace(made, trigger=second.trigger, numbers=())
    if rng.random() < RECOMBINED:
        made = replace(made, planner=second.planner, numbers=())
    known = numbers_of(made.trigger, made.planner)
    made = replace(made, numbers=tuple((n, v) for n, v in made.numbers if n in known))
    return varied(made, rng)


Cost = Callable[[Genome], float]


def search(
    start: Sequence[Genome],
    cost: Cost,
    tries: int,
    rng: np.random.Generator,
    breed: Callable[[Sequence[Genome], np.random.Generator], Genome] = child,
    keep: int = 6,
) -> list[Genome]:
    """Return the best genomes found within so many tries, best first.

    An evolution strategy with a small elite: each child is bred from the `keep` best so far.
    """
    scored = {genome: cost(genome) for genome in start}
    for _ in range(max(tries - len(scored), 0)):
        elite = sorted(scored, key=lambda g: scored[g])[:keep]
        made = breed(elite, rng)
        if made not in scored:
            scored[made] = cost(made)
    return sorted(scored, key=lambda g: scored[g])[:keep]
