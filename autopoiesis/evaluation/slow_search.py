"""A search over slow policies of the paper's clusters: the product's variation, the total time as the cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from autopoiesis.arms.migration import Order
from autopoiesis.arms.seeds import slow_seeds
from autopoiesis.arms.slow import verify_slow
from autopoiesis.evaluation.slow_policy import Loaded, loaded
from autopoiesis.synthesis.slow_mutation import NUMERIC, WRAPPING, vary_slow

FULL_ORDER = frozenset({"full-migration"})
"""Seeds whose changes stop everything: the paper's full migration."""
MORE = 0.4
"""Chance that what was varied is varied once more."""
ATTEMPTS = 8
"""How often variation may fail before the parent itself is returned."""


@dataclass(frozen=True, slots=True)
class Genome:
    """One slow policy: its verified text, and how far its changes go."""

    source: str
    order: Order = Order.MINIMAL
    name: str = field(default="", compare=False)
    """The seed that it descends from, and what was done to it last."""

    @property
    def seed(self) -> str:
        """Name of the seed that it descends from."""
        return self.name.partition(":")[0]


@cache
def policy_of(genome: Genome) -> Loaded:
    """Return the genome's functions."""
    return loaded(verify_slow(genome.source), genome.name, genome.order)


def seeds() -> dict[str, Genome]:
    """Return the slow seeds that people wrote, by name."""
    return {
        seed.name: Genome(
            seed.policy.source,
            Order.FULL if seed.name in FULL_ORDER else Order.MINIMAL,
            seed.name,
        )
        for seed in slow_seeds()
    }


Breed = Callable[[Sequence[Genome], np.random.Generator], Genome]


def varied(parents: Sequence[Genome], rng: np.random.Generator) -> Genome:
    """Return one of the parents with other numbers and batch limits; what it consists of stays."""
    return _varied(parents[int(rng.integers(len(parents)))], (), rng, NUMERIC)


def child(parents: Sequence[Genome], rng: np.random.Generator) -> Genome:
    """Return one of the parents varied, perhaps with parts of the others."""
    first = parents[int(rng.integers(len(parents)))]
    mates = [parent.source for parent in parents if parent.source != first.source]
    return _varied(first, mates, rng, None)


def wrapped(genome: Genome, rng: np.random.Generator) -> list[Genome]:
    """Return the genome with its planner inside each of those that decide how far a change of plan goes."""
    made = [_varied(genome, (), rng, (how,), more=0.0) for how in WRAPPING]
    return [replace(each, order=Order.MINIMAL) for each in made if each.source != genome.source]


def _varied(
    genome: Genome,
    mates: Sequence[str],
    rng: np.random.Generator,
    operators: "tuple[tuple[str, Callable[..., str | None]], ...] | None",
    more: float = MORE,
) -> Genome:
    source, done = genome.source, list[str]()
    for _ in range(ATTEMPTS):
        made = vary_slow(source, mates, rng, operators)
        if made is None:
            continue
        source = made[0].source
        done.append(made[1])
        if rng.random() >= more:
            break
    return Genome(
        source, genome.order, f"{genome.seed}: {', '.join(done)}" if done else genome.name
    )


Cost = Callable[[Genome], float]


def search(
    start: Sequence[Genome],
    cost: Cost,
    tries: int,
    rng: np.random.Generator,
    breed: Breed = child,
    keep: int = 6,
    first: Callable[[Genome], Sequence[Genome]] = lambda _: (),
) -> list[Genome]:
    """Return the best genomes found within so many tries, best first.

    An evolution strategy with a small elite: each child is bred from the `keep` best so far, before them
    what is to be tried `first` of those to start with. What was tried before costs no try.
    """
    scored = {genome: cost(genome) for genome in start}
    planned = [made for genome in _best_of(scored) for made in first(genome)]
    for _ in range(ATTEMPTS * tries):
        if len(scored) >= tries:
            break
        made = planned.pop(0) if planned else breed(_best_of(scored)[:keep], rng)
        if made not in scored:
            scored[made] = cost(made)
    return _best_of(scored)[:keep]


def _best_of(scored: dict[Genome, float]) -> list[Genome]:
    """Return the genomes, best first; of those that cost the same to three digits, the one tried first.

    They do the same: thinking is measured, so the last digits differ.
    """
    different = {float(f"{cost:.3g}"): genome for genome, cost in reversed(scored.items())}
    return [different[cost] for cost in sorted(different)]
