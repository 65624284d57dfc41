"""The proposer that needs no model: mutation and crossover of policies."""

import ast
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from autopoiesis.arms.arm import Origin, arm_id
from autopoiesis.arms.language import Policy, PolicyError, verify
from autopoiesis.arms.slow import verify_slow
from autopoiesis.synthesis.brief import Brief
from autopoiesis.synthesis.mutation import OPERATORS
from autopoiesis.synthesis.proposer import Account, Parent, Proposal, joined
from autopoiesis.synthesis.slow_mutation import vary_slow
from autopoiesis.telemetry.records import CandidateRow

MATE_SHARE = 0.5
"""Share of proposals that may take parts from a second parent."""
SLOW_SHARE = 0.7
"""Share of proposals whose slow functions are varied, where plans are judged."""
BOTH_SHARE = 0.3
"""Of these, the share whose fast functions are varied too."""
TRIES = 20
"""Tries per proposal wanted before giving up."""
LARGEST_TREE = 400
"""Nodes of a policy's tree; larger ones are not proposed, so that people can read what wins."""
PRESSURE = 0.85
"""Each rank is chosen this much less often than the one before it."""

_TOTAL = sum(weight for weight, _, _ in OPERATORS)
_ODDS = [weight / _TOTAL for weight, _, _ in OPERATORS]


class GeneticProposer:
    """Varies its parents. Every proposal verifies and none is proposed twice."""

    origin = Origin.GENETIC
    account = Account()

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def propose(
        self, brief: Brief, parents: Sequence[Parent], n: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Return n new policies, fewer only if variation no longer finds any."""
        self._seen.update(incumbent.arm_id for incumbent in brief.incumbents)
        self._seen.update(brief.known)
        self._seen.update(parent.id for parent in parents)
        odds = PRESSURE ** np.arange(len(parents))
        odds /= odds.sum()
        proposals: list[Proposal] = []
        for _ in range(n * TRIES):
            if len(proposals) == n:
                break
            first, second = rng.choice(len(parents), 2, p=odds)
            crossed = second != first and rng.random() < MATE_SHARE
            mates = [parents[second]] if crossed else []
            made = _vary_both(parents[first], mates, rng)
            if made is None or made[0] in self._seen:
                continue
            id_, source, thought = made
            self._seen.add(id_)
            lineage = (parents[first].id, *(mate.id for mate in mates))
            proposals.append(Proposal(source, self.origin, lineage, thought))
        return proposals

    def learn(self, verdicts: Sequence[tuple[Proposal, CandidateRow]]) -> None:
        """Selection has already taught it all it can use."""


def _vary_both(
    parent: Parent, mates: Sequence[Parent], rng: np.random.Generator
) -> tuple[str, str, str] | None:
    """Vary a policy's fast functions, its slow ones if it has some, or both; return id, source and what was done."""
    if not parent.slow:
        made = _vary(parent, mates, rng)
        return None if made is None else (made[0].id, made[0].source, made[1])
    fast, slow, done = verify(parent.source), verify_slow(parent.slow), list[str]()
    if rng.random() < SLOW_SHARE:
        varied = vary_slow(slow.source, [mate.slow for mate in mates], rng)
        if varied is not None:
            slow = varied[0]
            done.append(f"{' and '.join(p.name for p in (parent, *mates))}: {varied[1]}")
    if not done or rng.random() < BOTH_SHARE:
        made = _vary(parent, mates, rng)
        if made is not None:
            fast = made[0]
            done.append(made[1])
    if not done:
        return None
    return arm_id(fast.id, slow.id), joined(fast.source, slow.source), "; ".join(done)


def _vary(
    parent: Parent, mates: Sequence[Parent], rng: np.random.Generator
) -> tuple[Policy, str] | None:
    """Apply one to three operators; None where they found nothing to do or left no policy."""
    tree = ast.parse(parent.source)
    others = [ast.parse(mate.source) for mate in mates]
    done: list[str] = []
    for _ in range(min(int(rng.geometric(0.6)), 3)):
        _, what, operator = OPERATORS[rng.choice(len(OPERATORS), p=_ODDS)]
        if operator(tree, others, rng):
            done.append(what)
    if not done or sum(1 for _ in ast.walk(tree)) > LARGEST_TREE:
        return None
    with suppress(PolicyError):
        names = " and ".join(p.name for p in (parent, *mates))
        return verify(ast.unparse(ast.fix_missing_locations(tree))), f"{names}: {', '.join(done)}"
    return None
