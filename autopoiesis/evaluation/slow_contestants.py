"""Who plans the paper's clusters: fixed, tuned, evolved once, switching, evolving; none sees what comes.

The past that may be learned from is the cluster's other trace. While serving, candidates are judged in
the twin from the present state: how soon would what has arrived be done? That is known when it is asked.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from autopoiesis.arms.migration import Order
from autopoiesis.arms.slow_features import FleetFeatures, WindowFeatures
from autopoiesis.evaluation.bound import bound_s
from autopoiesis.evaluation.cluster import measuring_cpu_s
from autopoiesis.evaluation.contestants import BOUND, FROZEN, HARMFUL, ORACLE, OURS, SWITCHING
from autopoiesis.evaluation.effort import Spent
from autopoiesis.evaluation.plan_view import MONITOR_S
from autopoiesis.evaluation.slow_policy import Answer
from autopoiesis.evaluation.slow_search import (
    Genome,
    child,
    policy_of,
    search,
    seeds,
    varied,
    wrapped,
)
from autopoiesis.evaluation.total_time import LIMIT_S, Decide, run, total_time
from autopoiesis.evaluation.workload import Spell, State, Workload, done

AGAIN = 0.5
"""Share of a phase that is expected to come once more after it, as it is."""
HYSTERESIS = 0.02
"""Share of the remaining time by which another policy must be better to take over."""
PEOPLE = frozenset(seeds().values())
BRED = 6
"""Policies that were bred and are kept for the next look."""
UNTRIED = 0.1
"""Loss that is expected of a policy before it has been tried."""
WORST = 1.0
"""Loss in one look that counts at most."""
PARENTS = 6
"""Best policies that are bred from."""
HORIZON_S = 900.0
"""A trial that is not done by then counts as one that never is."""
HOPELESS = 2.0
"""Times the best so far after which a trial on the past is given up."""
TRIAL_CPU_S = 4.0
"""Thinking of a policy after which a trial is given up: it would think too long in truth as well."""
LOOK_CPU_S = 2.0
"""Thinking after which a look ends, whoever has not been tried by then: the fleet serves on under the old plan
meanwhile. One policy gets at most a quarter of it."""
TRIAL_STEP_S = 10.0
"""How often a policy is asked in a trial: less often than really, so that a trial costs less."""
LOOK_STEPS = 8
"""Steps after which candidates are compared although nothing has changed."""


@dataclass(frozen=True, slots=True)
class SlowEffort:
    """How much a search may try."""

    past_tries: int = 200
    """Policies tried on the past, by evolution or for each arm that is tuned."""
    tries: int = 24
    """New policies tried at each look while serving."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What came of a workload."""

    state: State
    spent: Spent
    said: str = ""
    promoted: int = 0
    harmful: int = 0


SlowContestant = Callable[[Workload, Workload, SlowEffort, int], Planned]
"""From a workload, the past, the effort and a seed to what came of it."""


def fixed(genome: Genome) -> SlowContestant:
    """Return one policy from beginning to end."""
    return lambda work, _past, _effort, _seed: Planned(_alone(work, genome), Spent(), genome.name)


def _alone(work: Workload, genome: Genome) -> State:
    policy = policy_of(genome)
    return total_time(work, lambda at, w, f: (policy.decide(w, f, at.plan), policy.order))


class _OverthoughtError(Exception):
    """A policy thinks for too long to be worth a trial."""


def _tried(genome: Genome, most_cpu_s: float) -> Decide:
    """Return the policy as trial runs ask it; it raises _OverthoughtError when it has thought for so long."""
    policy = policy_of(genome)
    thought_s = 0.0

    def decide(at: State, window: WindowFeatures, fleet: FleetFeatures) -> tuple[Answer, Order]:
        nonlocal thought_s
        began_s = time.process_time()
        answer = policy.imagine(window, fleet, at.plan)
        thought_s += time.process_time() - began_s
        if thought_s > most_cpu_s:
            raise _OverthoughtError
        return answer, policy.order

    return decide


def _trial_s(
    work: Workload,
    state: State,
    genome: Genome,
    until_s: float,
    step_s: float = TRIAL_STEP_S,
    most_cpu_s: float = TRIAL_CPU_S,
) -> float:
    """Go on from a state under a policy; return how long it takes until all is done, `LIMIT_S` if it is not by then."""
    began_s = state.now_s
    try:
        run(work, state, _tried(genome, most_cpu_s), until_s, step_s)
    except _OverthoughtError:
        return LIMIT_S
    return state.now_s - began_s if done(work, state) else LIMIT_S


@contextmanager
def _thinking(spent: Spent) -> Generator[None]:
    """Charge the CPU time of what runs inside, but not that of measuring what replicas serve.

    People's planners are told that, too, and do not pay for it.
    """
    before_s = measuring_cpu_s()
    with spent.thinking():
        yield
    spent.cpu_s -= measuring_cpu_s() - before_s


def _past_cost(past: Workload, spent: Spent) -> Callable[[Genome], float]:
    best_s = LIMIT_S

    def cost(genome: Genome) -> float:
        nonlocal best_s
        with _thinking(spent):
            spent.replays += 1
            start = State(left=past.batches[0].requests)
            found_s = _trial_s(past, start, genome, min(HOPELESS * best_s, LIMIT_S), MONITOR_S)
            best_s = min(best_s, found_s)
            return found_s

    return cost


def tuned(genome: Genome) -> SlowContestant:
    """Return a seed with the numbers and limits that are best on the past."""

    def serve(work: Workload, past: Workload, effort: SlowEffort, seed: int) -> Planned:
        spent, rng = Spent(), np.random.default_rng([seed, 9])
        best = search(
            [genome],
            _past_cost(past, spent),
            effort.past_tries,
            rng,
            varied,
        )[0]
        return Planned(_alone(work, best), spent, _told(best))

    return serve


def frozen(work: Workload, past: Workload, effort: SlowEffort, seed: int) -> Planned:
    """Evolve on the past, then keep the best of it."""
    spent = Spent()
    best = _evolved_on(past, effort, seed, spent)[0]
    return Planned(_alone(work, best), spent, _told(best))


def _told(genome: Genome) -> str:
    return f"# {genome.name}\n{genome.source}"


def _evolved_on(past: Workload, effort: SlowEffort, seed: int, spent: Spent) -> list[Genome]:
    rng = np.random.default_rng([seed, 10])
    return search(
        [*seeds().values()],
        _past_cost(past, spent),
        effort.past_tries,
        rng,
        first=lambda genome: wrapped(genome, rng),
    )


def outlook(work: Workload, state: State) -> Workload:
    """Return what is known to be ahead: what is left of the phase, and part of it once more.

    Prompts have arrived, so their lengths are known; of outputs only what finished last. The GPUs
    there are now are taken to stay.
    """
    batch = replace(work.batches[state.phase], output_tokens=state.output_tokens)
    again = replace(batch, requests=tuple(AGAIN * n for n in batch.requests))
    pools = tuple(
        replace(pool, count=work.cluster.available(pool.gpu, state.now_s))
        for pool in work.cluster.pools
    )
    cluster = replace(work.cluster, pools=pools, elastic=False)
    return Workload(cluster, (batch, again), work.costs)


@dataclass(frozen=True, slots=True)
class Living:
    """Policies that are chosen anew while serving, and bred too if it evolves."""

    evolves: bool = True
    sees: Callable[[Workload, State], Workload] = outlook

    def __call__(self, work: Workload, past: Workload, effort: SlowEffort, seed: int) -> Planned:
        """Serve the workload."""
        spent = Spent()
        population = [*seeds().values()]
        if self.evolves:
            population = [*_evolved_on(past, effort, seed, spent), *population]
        mind = _Mind(
            work,
            list(dict.fromkeys(population)),
            effort.tries if self.evolves else 0,
            np.random.default_rng([seed, 11]),
            spent,
            self.sees,
        )
        state = total_time(work, mind.decide)
        chosen = "\n".join(f"{swap.at.now_s:.0f} s: {swap.new.name}" for swap in mind.swaps)
        harmful = sum(is_harmful(work, swap) for swap in mind.swaps)
        return Planned(state, spent, chosen, len(mind.swaps), harmful)


@dataclass(frozen=True, slots=True)
class Swap:
    """One policy in place of another."""

    at: State
    old: Genome
    new: Genome


def is_harmful(work: Workload, swap: Swap) -> bool:
    """Tell whether what came after would have taken longer with the new policy alone; hindsight."""

    def left_s(genome: Genome) -> float:
        return _trial_s(work, swap.at.copy(), genome, LIMIT_S)

    return left_s(swap.new) > (1.0 + HARMFUL) * left_s(swap.old)


@dataclass(slots=True)
class _Mind:
    """The choice among policies, asked after each monitoring step."""

    work: Workload
    population: list[Genome]
    """Best first; the first is in charge to begin with."""
    tries: int
    rng: np.random.Generator
    spent: Spent
    sees: Callable[[Workload, State], Workload]
    current: Genome = field(init=False)
    swaps: list[Swap] = field(default_factory=list[Swap])
    _losses: dict[Genome, list[float]] = field(default_factory=dict[Genome, list[float]])
    """Of each policy, by what part it was slower than the best of each look that it was tried in."""
    _seen: tuple[int, int, int] = (0, 0, 0)
    _steps: int = 0

    def __post_init__(self) -> None:
        self.current = self.population[0]

    def decide(
        self, state: State, window: WindowFeatures, fleet: FleetFeatures
    ) -> tuple[Answer, Order]:
        """Choose a policy if something has changed, then ask it; what choosing took is charged.

        Where GPUs have come or gone the one in charge answers at once, and the next step finds who is chosen.
        """
        now = (state.phase, sum(g.available for g in fleet.gpus), round(state.output_tokens))
        self._steps += 1
        looks = bool(state.plan.groups) and (now != self._seen or self._steps >= LOOK_STEPS)
        urgent = now[1] != self._seen[1]
        self._seen = now
        in_charge, took_s = self.current, 0.0
        if looks:
            before_s = self.spent.cpu_s
            with _thinking(self.spent):
                self._look(state)
            if not urgent:
                in_charge = self.current
                took_s = self.spent.cpu_s - before_s if self.sees is outlook else 0.0
            self.spent.cycles += 1
            self._steps = 0
        policy = policy_of(in_charge)
        answer = policy.decide(window, fleet, state.plan)
        return Answer(answer.plan, answer.cpu_s + took_s), policy.order

    def _look(self, state: State) -> None:
        """Compare the population on what is to be done now, breed from the best of it, and choose."""
        ahead = self.sees(self.work, state)
        until_s = time.process_time() + LOOK_CPU_S
        costs: dict[Genome, float] = {}
        for genome in dict.fromkeys([self.current, *self.population]):
            if costs and time.process_time() > until_s:
                break
            costs[genome] = self._cost(ahead, state, genome)
        parents = sorted(costs, key=lambda g: costs[g])[:PARENTS]
        for i in range(self.tries):
            if time.process_time() > until_s:
                break
            made = (varied if i % 2 else child)(parents, self.rng)
            if made not in costs:
                costs[made] = self._cost(ahead, state, made)
        least = min(costs.values())
        for genome, cost in costs.items():
            loss = round(min(cost / least - 1.0, WORST), 2)
            self._losses.setdefault(genome, []).append(loss)
        best = min(costs, key=lambda g: costs[g])
        if costs[best] < (1.0 - HYSTERESIS) * costs[self.current]:
            self.swaps.append(Swap(state.copy(), self.current, best))
            self.current = best
        self.population = self._kept()

    def _kept(self) -> list[Genome]:
        """Return people's policies and the best that were bred, best first: what does the same adds nothing."""
        known = {*PEOPLE, *self.population, *self._losses}
        ranked = sorted(known, key=self._standing)
        bred = {tuple(self._losses.get(g, ())): g for g in reversed(ranked) if g not in PEOPLE}
        kept = {*PEOPLE, *sorted(bred.values(), key=self._standing)[:BRED]}
        self._losses = {g: losses for g, losses in self._losses.items() if g in kept}
        return [g for g in ranked if g in kept]

    def _standing(self, genome: Genome) -> float:
        """Return a policy's mean loss over all looks; one that it was not in counts as `UNTRIED`."""
        losses = self._losses.get(genome, ())
        return (sum(losses) + UNTRIED) / (len(losses) + 1)

    def _cost(self, ahead: Workload, state: State, genome: Genome) -> float:
        """Return how long the outlook would take from here under a policy [s]."""
        self.spent.replays += 1
        trial = state.copy()
        trial.phase = 0
        until_s = state.now_s + HORIZON_S
        return _trial_s(ahead, trial, genome, until_s, most_cpu_s=LOOK_CPU_S / 4)


def truth(work: Workload, state: State) -> Workload:
    """Return what really is ahead, GPUs included: for the oracle alone."""
    return replace(work, batches=work.batches[state.phase :])


def bound(work: Workload, _past: Workload, _effort: SlowEffort, _seed: int) -> Planned:
    """Return what no policy can be faster than; nobody decides anything here."""
    at_s = bound_s(work)
    state = State(now_s=at_s, phase=len(work.batches))
    state.spent[Spell.SERVING] = at_s  # pyright: ignore[reportArgumentType] - seconds, not counts
    return Planned(state, Spent())


def contestants() -> dict[str, SlowContestant]:
    """Return the contestants by name, as those that decide request by request are called."""
    return {
        **{f"human/{name}": fixed(genome) for name, genome in seeds().items()},
        **{f"tuned/{name}": tuned(genome) for name, genome in seeds().items()},
        FROZEN: frozen,
        SWITCHING: Living(evolves=False),
        OURS: Living(),
        ORACLE: Living(evolves=False, sees=truth),
        BOUND: bound,
    }
