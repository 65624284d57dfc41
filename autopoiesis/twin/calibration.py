"""Refit a profile so that the twin reproduces what real replicas did.

The twin is in the loop: each replica is replayed alone with the requests it was really sent, and
multipliers of groups of coefficients are turned until times to first token and times per token
agree, by robust least squares on their logarithms (`scipy.optimize.least_squares`, soft L1). Two
starts are tried: the profile scaled to the fastest tokens seen, and a linear model from a
regression of token times on concurrency and prefill. Coefficients that act alike (a sequence's
cost and its context's, say) are told apart poorly, and their intervals are wide; what is predicted
does not suffer from that.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.twin.capacity import ReplicaSpec
from autopoiesis.twin.latency import ClientOverhead, Profile, StepModel
from autopoiesis.twin.outcome import Outcome
from autopoiesis.twin.recorded import Recorded
from autopoiesis.twin.simulation import run_arm
from autopoiesis.twin.split import Choice, Mask, everything

Floats = NDArray[np.float64]
Progress = Callable[[str], None]

FEWEST_REQUESTS = 50
"""Requests with a first token below which nothing is fitted."""
GROUPS: dict[str, tuple[str, ...]] = {
    "step": ("weights_s", "head_s", "host_s", "decode_s", "mixed_s", "mixed_decode_s"),
    "token": ("token_s", "prefill_token_s"),
    "sequence": ("host_sequence_s", "head_sequence_s", "decode_sequence_s", "mixed_sequence_s"),
    "context": ("decode_context_token_s", "mixed_context_token_s"),
    "pairs": ("prefill_pair_s", "prefill_cached_token_s"),
}
"""Coefficients that are turned together."""
HTTP = "http"
"""The parameter for `ClientOverhead.request_s`: what lies between gateway and engine."""
PRIOR = 0.1
"""Weight of staying at the start, per parameter: keeps what the data do not tell."""
SCALE = 0.2
"""Deviation of a logarithm beyond which a request counts as an outlier."""
STEP = 0.4
"""Difference of a logarithm for derivatives; a simulator of queues is not smooth on less."""
PAIRS = 0.5
"""Share of a long prompt's time that attention over itself is first taken for: from nothing no fit finds it."""
NEAR, FAR = 0.05, 1.6
"""Shortest and longest reach of an interval that is looked at, on the logarithm."""
BLOCKS = 20
"""Blocks of time that are taken as independent of each other."""
CONFIDENCE = 0.9

_ANYWHERE = compile_policy(verify("def score(request, replica, fleet):\n    return 0.0\n"))
_UNUSED = Objective()


class CalibrationError(ValueError):
    """Nothing can be fitted; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Coefficient:
    """One coefficient before and after, with its interval."""

    name: str
    before: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A profile fitted to what replicas of one class did."""

    profile: Profile
    coefficients: tuple[Coefficient, ...]
    speeds: dict[str, float]
    """Replica → its speed relative to the profile."""
    requests: int
    error_before: float
    """Mean absolute error of the logarithms of the times, with the profile as it was."""
    error: float

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "profile": asdict(self.profile),
            "coefficients": [asdict(c) for c in self.coefficients],
            "speeds": self.speeds,
            "requests": self.requests,
            "error_before": self.error_before,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """Turns parameters (logarithms) into a profile and the replicas' speeds."""

    start: Profile
    groups: tuple[str, ...]
    replicas: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.groups) + 1 + len(self.replicas) - 1

    def origin(self, http_s: float) -> Floats:
        origin = np.zeros(self.size)
        origin[len(self.groups)] = math.log(http_s)
        return origin

    def profile(self, theta: Floats) -> Profile:
        step = self.start.step
        turned = {
            name: getattr(step, name) * math.exp(value)
            for group, value in zip(self.groups, theta.tolist(), strict=False)
            for name in GROUPS[group]
        }
        http_s = math.exp(theta[len(self.groups)])
        client = ClientOverhead(request_s=http_s, end_s=0.0, token_s=0.0)
        return replace(self.start, step=replace(step, **turned), client=client)

    def speeds(self, theta: Floats) -> dict[str, float]:
        others = np.exp(theta[len(self.groups) + 1 :]).tolist()
        return dict(zip(self.replicas, [1.0, *others], strict=True))


def calibrate(
    recordings: Sequence[Recorded],
    profile: Profile,
    fitted: Choice = everything,
    tell: Progress = lambda _line: None,
) -> Calibration:
    """Fit a profile to what replicas of one class did with the requests that are `fitted`.

    The others only load the replicas. The engine's limits and memory are the profile's.

    Raises:
        CalibrationError: there are too few requests, or the engine could not have served them.
    """
    rows = [fitted(r.trace.arrival_s) for r in recordings]
    usable = sum(int(np.isfinite(r.ttft_s[m]).sum()) for r, m in zip(recordings, rows, strict=True))
    if usable < FEWEST_REQUESTS:
        raise CalibrationError(
            f"{usable} streamed requests are too few to calibrate on; at least {FEWEST_REQUESTS} are "
            "needed: serve more, or take more windows"
        )
    _check_memory(recordings, profile)
    names = tuple(r.replica for r in recordings)
    best: tuple[float, _Model, Floats, _Residuals] | None = None
    for what, start in _starts(recordings, rows, profile).items():
        groups = tuple(g for g, c in GROUPS.items() if any(getattr(start.step, n) > 0.0 for n in c))
        model = _Model(start, groups, names)
        residuals = _Residuals(model, recordings, rows, _http_s(recordings, rows))
        tell(f"fitting from the {what}")
        fit = least_squares(
            residuals,
            residuals.origin,
            jac=residuals.jacobian,  # pyright: ignore[reportArgumentType] - a callable is allowed
            loss="soft_l1",
            f_scale=SCALE,
            max_nfev=40,
            xtol=1e-3,
            ftol=1e-5,
        )
        if best is None or fit.cost < best[0]:
            best = float(fit.cost), model, np.asarray(fit.x), residuals
    assert best is not None
    _, model, theta, residuals = best
    return _result(profile, model, theta, residuals, usable)


def _check_memory(recordings: Sequence[Recorded], profile: Profile) -> None:
    for r in recordings:
        longest = int((r.trace.input_tokens + r.trace.output_tokens).max())
        if longest > profile.kv_tokens:
            raise CalibrationError(
                f"{r.replica} served a request of {longest} tokens, which {profile.name} cannot hold in "
                f"its KV cache of {profile.kv_tokens} tokens; give the real size with --kv-tokens"
            )


def replay(
    recording: Recorded, profile: Profile, speed: float = 1.0
) -> tuple[Floats, Floats, Floats]:
    """Return the twin's TTFT, TPOT and E2E [s] for what a replica was sent, as the gateway sees them."""
    outcome: Outcome = run_arm(
        recording.trace, [ReplicaSpec(recording.replica, profile, speed)], _ANYWHERE, _UNUSED, 0
    )
    client = profile.client
    answered = client.request_s + client.token_s
    ended = client.request_s + client.end_s + client.token_s * recording.trace.output_tokens
    tpot_s = outcome.tpot_s + client.token_s
    return outcome.ttft_s + answered, tpot_s, outcome.e2e_s + ended


class _Residuals:
    """Logarithms of simulated over observed times, and how far the parameters are from the start."""

    def __init__(
        self, model: _Model, recordings: Sequence[Recorded], rows: Sequence[Mask], http_s: float
    ) -> None:
        self.model = model
        self.origin = model.origin(http_s)
        self.recordings, self.rows = recordings, rows
        self._seen = [
            tuple(np.isfinite(x) & (x > 0.0) & m for x in (r.ttft_s, r.tpot_s))
            for r, m in zip(recordings, rows, strict=True)
        ]
        self._blocks = self._blocks_of_time()

    def __call__(self, theta: Floats) -> Floats:
        return np.concatenate([self.of_requests(theta), PRIOR * (theta - self.origin)])

    def of_requests(self, theta: Floats) -> Floats:
        """Return the residuals of the requests: of each replica, first those of TTFT."""
        profile, speeds = self.model.profile(theta), self.model.speeds(theta)
        parts: list[Floats] = []
        for r, (first, later) in zip(self.recordings, self._seen, strict=True):
            ttft_s, tpot_s, _ = replay(r, profile, speeds[r.replica])
            parts += [
                np.log(ttft_s[first] / r.ttft_s[first]),
                np.log(tpot_s[later] / r.tpot_s[later]),
            ]
        return np.concatenate(parts)

    def jacobian(self, theta: Floats) -> Floats:
        """Return the derivatives by central differences: a simulator of queues is not smooth."""
        columns: list[Floats] = []
        for k in range(len(theta)):
            up, down = theta.copy(), theta.copy()
            up[k] += STEP
            down[k] -= STEP
            columns.append((self(up) - self(down)) / (2 * STEP))
        return np.stack(columns, axis=1)

    def block_costs(self, theta: Floats) -> Floats:
        """Return the soft L1 cost of each block of time."""
        cost = SCALE**2 * (np.sqrt(1.0 + (self.of_requests(theta) / SCALE) ** 2) - 1.0)
        sums = np.bincount(self._blocks, weights=cost).astype(np.float64)
        return sums[np.bincount(self._blocks) > 0]

    def _blocks_of_time(self) -> NDArray[np.int64]:
        """Return the block of each request's residual."""
        last_s = max(float(r.trace.arrival_s[-1]) for r in self.recordings)
        blocks: list[NDArray[np.int64]] = []
        for r, (first, later) in zip(self.recordings, self._seen, strict=True):
            block = (r.trace.arrival_s / max(last_s, 1e-9) * BLOCKS).astype(np.int64)
            blocks += [block[first], block[later]]
        return np.concatenate(blocks)


def _starts(
    recordings: Sequence[Recorded], rows: Sequence[Mask], profile: Profile
) -> dict[str, Profile]:
    """Return the profile scaled to the fastest tokens seen, and a linear one from a regression."""
    starts = {"profile": profile}
    tpot_s = _column(recordings, rows, "tpot_s")
    if len(tpot_s):
        alone = [replace(r, trace=r.trace.speed(1e-3)) for r in recordings]
        fastest = np.concatenate([replay(r, profile)[1] for r in alone])
        ratio = float(np.percentile(tpot_s, 5) / np.nanmedian(fastest))
        scaled = {name: getattr(profile.step, name) * ratio for g in GROUPS.values() for name in g}
        starts["profile"] = replace(profile, step=replace(profile.step, **scaled))
        starts["regression"] = replace(profile, step=_regression(recordings, rows))
    return starts


def _regression(recordings: Sequence[Recorded], rows: Sequence[Mask]) -> StepModel:
    """Regress token times on what ran beside: a constant, sequences, prefill tokens a step, context."""
    from sklearn.linear_model import LinearRegression  # noqa: PLC0415 - 60 MB that only fitting needs

    design, target = zip(
        *(_regressors(r, m) for r, m in zip(recordings, rows, strict=True)), strict=True
    )
    x, y = np.concatenate(design), np.concatenate(target)
    fit: Any = LinearRegression(fit_intercept=False, positive=True).fit(x, y, 1.0 / y**2)
    floor = 1e-3 * float(np.median(y))
    least = [floor, floor / 16, floor / 256, 1e-9]
    step, sequence, token, context = np.maximum(fit.coef_, least).tolist()
    long = float(np.percentile(np.concatenate([r.trace.input_tokens for r in recordings]), 90))
    pair = max(context, 2.0 * PAIRS * token / long)
    return StepModel(
        weights_s=step, token_s=token, knee=1.0, head_s=0.0, head_sequence_s=0.0, host_s=0.0,
        host_sequence_s=sequence, decode_s=0.0, decode_context_token_s=context, decode_sequence_s=0.0,
        mixed_s=0.0, mixed_decode_s=0.0, mixed_context_token_s=context, mixed_sequence_s=0.0,
        prefill_token_s=0.0, prefill_pair_s=pair, prefill_cached_token_s=0.0,
    )  # fmt: skip


def _regressors(r: Recorded, rows: Mask) -> tuple[Floats, Floats]:
    """Return, per request with a token time, [1, decodes beside it, prefill tokens a step, context]."""
    sent_s = r.trace.arrival_s
    first_s, end_s = sent_s + r.ttft_s, sent_s + r.e2e_s
    chosen = np.flatnonzero(rows & np.isfinite(r.tpot_s) & (r.tpot_s > 0.0))
    whole = np.flatnonzero(rows & np.isfinite(end_s) & np.isfinite(first_s))
    tokens = r.trace.input_tokens + 0.5 * r.trace.output_tokens
    x = np.ones((len(chosen), 4))
    for k, i in enumerate(chosen.tolist()):
        span_s = max(end_s[i] - first_s[i], 1e-9)
        beside = np.minimum(end_s[whole], end_s[i]) - np.maximum(first_s[whole], first_s[i])
        share = np.clip(beside, 0.0, None) / span_s
        began = whole[(first_s[whole] > first_s[i]) & (first_s[whole] <= end_s[i])]
        steps = max(int(r.trace.output_tokens[i]) - 1, 1)
        x[k, 1] = share.sum()
        x[k, 2] = r.trace.input_tokens[began].sum() / steps
        x[k, 3] = (share * tokens[whole]).sum()
    return x, r.tpot_s[chosen]


def _column(recordings: Sequence[Recorded], rows: Sequence[Mask], name: str) -> Floats:
    values = np.concatenate([getattr(r, name)[m] for r, m in zip(recordings, rows, strict=True)])
    return values[np.isfinite(values) & (values > 0.0)]


def _http_s(recordings: Sequence[Recorded], rows: Sequence[Mask]) -> float:
    """Guess the time between gateway and engine: a small share of the shortest first token."""
    return max(0.1 * float(np.percentile(_column(recordings, rows, "ttft_s"), 1)), 1e-5)


def _result(
    before: Profile, model: _Model, theta: Floats, residuals: _Residuals, requests: int
) -> Calibration:
    profile = model.profile(theta)
    source = f"calibrated on {requests} requests of {', '.join(model.replicas)}; from {before.name}"
    profile = replace(profile, source=source, validated=False, check="")
    reach = _intervals(theta, residuals)
    wide = dict(zip((*model.groups, HTTP), np.exp(reach).tolist(), strict=False))
    coefficients = [
        Coefficient(n, getattr(before.step, n), v, v / wide[g][0], v * wide[g][1])
        for g in model.groups
        for n in GROUPS[g]
        if (v := getattr(profile.step, n)) > 0.0 or getattr(before.step, n) > 0.0
    ]
    http_s = profile.client.request_s
    down, up = wide[HTTP]
    coefficients.append(
        Coefficient("client.request_s", before.client.request_s, http_s, http_s / down, http_s * up)
    )
    as_it_was = _Model(before, (), model.replicas)
    then = _Residuals(
        as_it_was, residuals.recordings, residuals.rows, before.client.request_s or 1e-6
    )
    return Calibration(
        profile=profile,
        coefficients=tuple(coefficients),
        speeds=model.speeds(theta),
        requests=requests,
        error_before=float(np.abs(then.of_requests(then.origin)).mean()),
        error=float(np.abs(residuals.of_requests(theta)).mean()),
    )


def _intervals(theta: Floats, residuals: _Residuals) -> Floats:
    """Return how far each parameter can go down and up, (parameters, 2), on the logarithm.

    A coefficient is moved, the others follow as the derivatives say they compensate for it, until
    the twin predicts significantly worse: a paired t-test over blocks of time. A replay of queues is
    too rough for a covariance from derivatives alone, which is far too sure of itself.
    """
    at = residuals.of_requests(theta)
    jacobian = residuals.jacobian(theta)
    weight = np.concatenate([1.0 / np.sqrt(1.0 + (at / SCALE) ** 2), np.ones(len(theta))])
    covariance = np.linalg.inv(jacobian.T @ (jacobian * weight[:, None]))
    here = residuals.block_costs(theta)
    critical = float(student.ppf(0.5 + CONFIDENCE / 2, len(here) - 1))

    def reach(k: int, sign: float) -> float:
        direction = sign * covariance[k] / covariance[k, k]
        far = NEAR
        while far < FAR:
            worse = residuals.block_costs(theta + far * direction) - here
            if worse.mean() > critical * worse.std(ddof=1) / math.sqrt(len(worse)):
                break
            far *= 2.0
        return far

    return np.array([(reach(k, -1.0), reach(k, 1.0)) for k in range(len(theta))])
