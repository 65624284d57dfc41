"""What the control port tells Prometheus: `GET /metrics`.

Names follow vLLM's where there is one (`time_to_first_token_seconds`, `generation_tokens_total` ...). Label
sets are bounded: by the fleet, by the arms that serve now, and by words that stand in the code.
"""

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from autopoiesis import __version__
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.sandbox.isolation import Isolation
from autopoiesis.gateway.link import Batch
from autopoiesis.orchestrator.loop import Settled
from autopoiesis.orchestrator.status import Status
from autopoiesis.telemetry.records import ReplicaSample, SynthesisRow
from autopoiesis.telemetry.records import Status as Ending

PREFIX = "autopoiesis"
TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0)
TPOT_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8)
E2E_S = (0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)
DECISION_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1)

DETECTORS = ("context", "reward", "twin")
OUTCOMES = ("promoted", "nothing", "failed")


class Metrics:
    """Counters and histograms of this process's life, and gauges of now."""

    def __init__(
        self, status: Status, registry: Registry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._instruments()
        self._last_window_s = clock()
        self.window_age.set_function(lambda: self._clock() - self._last_window_s)
        self._registry.register(_Present(status, registry))
        ProcessCollector(registry=self._registry)
        # What has not happened yet is 0, not absent: rates are right from the first time on.
        for ending in Ending:
            self.requests.labels(ending)
        for detector in DETECTORS:
            self.drift.labels(detector)
        for outcome in OUTCOMES:
            self.cycles.labels(outcome)

    def _instruments(self) -> None:
        def counter(name: str, about: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, about, labels, namespace=PREFIX, registry=self._registry)

        def gauge(name: str, about: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, about, labels, namespace=PREFIX, registry=self._registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                name, about, namespace=PREFIX, registry=self._registry, buckets=buckets
            )

        self.requests = counter("requests", "Requests by how they ended.", ("status",))
        self.prompt_tokens = counter("prompt_tokens", "Input tokens of completed requests.")
        self.cached_tokens = counter(
            "prompt_tokens_cached", "Of these, expected in a prefix cache."
        )
        self.generation_tokens = counter("generation_tokens", "Output tokens.")
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first chunk.", TTFT_S)
        self.tpot = histogram("time_per_output_token_seconds", "After the first token.", TPOT_S)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to end.", E2E_S)
        self.decision = histogram("decision_seconds", "Time of the picker per request.", DECISION_S)
        self.held_time = histogram("held_seconds", "Time that requests were held back.", E2E_S)
        self.held = gauge("requests_held", "Requests that are held back now.")
        self.in_flight = gauge("requests_in_flight", "Requests at a replica now.", ("replica",))
        self.up = gauge("replica_up", "Whether the replica answers.", ("replica",))
        self.kv_usage = gauge("replica_kv_cache_usage_ratio", "Its own report.", ("replica",))
        self.windows = counter("windows", "Windows settled.")
        self.window_age = gauge("window_age_seconds", "Since a window was last settled.")
        self.utility = gauge("window_utility", "Mean utility per request, 0..1, last window.")
        self.regret = gauge("window_regret", "Of the last window.")
        self.regret_low = gauge("window_regret_low", "Lower end of its interval.")
        self.regret_high = gauge("window_regret_high", "Upper end of its interval.")
        self.regret_sum = counter("regret_sum", "Sum of the windows' regret.")
        self.drift = counter("drift_alarms", "Drift alarms by detector.", ("detector",))
        self.twin_error = gauge("twin_error", "Twin minus observed, last window.", ("metric",))
        self.observed = gauge("twin_observed", "What was observed there.", ("metric",))
        self.twin_weight = gauge("twin_weight", "Weight of the twin in the estimates, 0..1.")
        self.cycles = counter("synthesis_cycles", "Synthesis cycles by outcome.", ("outcome",))
        self.candidates = counter("synthesis_candidates", "By the gate that decided.", ("gate",))
        self.promoted = counter("synthesis_promoted", "Candidates that became arms.")
        self.synthesis_s = counter("synthesis_seconds", "Time of synthesis cycles.")
        self.synthesis_cpu_s = counter("synthesis_cpu_seconds", "CPU time of synthesis cycles.")
        self.synthesis_tokens = counter("synthesis_tokens", "Tokens spent on proposals.")
        self.synthesis_usd = counter("synthesis_cost_usd", "Money spent on proposals.")
        self.isolation = gauge(
            "sandbox_isolation_level", "What holds slow functions back, 0 to 4.", ("level",)
        )
        self.arm_faults = counter("arm_faults", "Decisions in which an arm failed.")
        self.store_errors = counter("store_errors", "Writes of telemetry that failed.")
        self.windows_waiting = gauge("windows_waiting", "Windows that are not written yet.")
        build = gauge("build_info", "Version.", ("version",))
        build.labels(__version__).set(1)

    # --- what the controller tells ------------------------------------------------------------

    def saw(self, batch: Batch) -> None:
        """Count what the picker reports."""
        for record in batch.requests:
            self.requests.labels(record.status).inc()
            self.decision.observe(record.decision_s)
            self.held_time.observe(record.held_s)
            self.generation_tokens.inc(record.output_tokens)
            if record.status is Ending.COMPLETED:
                self.prompt_tokens.inc(record.input_tokens)
                self.cached_tokens.inc(record.cached_tokens)
                self.e2e.observe(record.e2e_s)
            if record.ttft_s is not None:
                self.ttft.observe(record.ttft_s)
            if (tpot_s := record.tpot_s) is not None:
                self.tpot.observe(tpot_s)
        self.arm_faults.inc(sum(fault.count for fault in batch.faults if fault.arm_id))
        self.held.set(sum(not request.replica for request in batch.open_requests))
        for sample in batch.replicas:
            self._sampled(sample)

    def _sampled(self, sample: ReplicaSample) -> None:
        self.in_flight.labels(sample.replica).set(sample.in_flight)
        self.up.labels(sample.replica).set(sample.healthy)
        self.kv_usage.labels(sample.replica).set(sample.kv_usage)

    def settled(self, settled: Settled) -> None:
        """Take in a window that was settled."""
        row = settled.window
        nothing = float("nan")
        self.windows.inc()
        self._last_window_s = self._clock()
        self.utility.set(nothing if row.utility is None else row.utility)
        self.regret.set(nothing if row.regret is None else row.regret)
        self.regret_low.set(nothing if row.regret_low is None else row.regret_low)
        self.regret_high.set(nothing if row.regret_high is None else row.regret_high)
        self.regret_sum.inc(max(row.regret or 0.0, 0.0))
        self.twin_weight.set(row.twin_weight)
        for detector in filter(None, row.drift.split(",")):
            self.drift.labels(detector).inc()
        for error in settled.twin_errors:
            self.twin_error.labels(error.metric).set(error.twin - error.observed)
            self.observed.labels(error.metric).set(error.observed)

    def synthesized(self, row: SynthesisRow) -> None:
        """Count a synthesis cycle."""
        outcome = "failed" if row.error else "promoted" if row.promoted else "nothing"
        self.cycles.labels(outcome).inc()
        for gate, count in Tally(candidate.gate for candidate in row.candidates).items():
            self.candidates.labels(gate).inc(count)
        self.promoted.inc(len(row.promoted))
        self.synthesis_s.inc(row.seconds)
        self.synthesis_cpu_s.inc(row.cpu_seconds)
        self.synthesis_tokens.inc(row.tokens)
        self.synthesis_usd.inc(row.cost_usd)

    def isolated(self, reached: Isolation) -> None:
        """Tell how well slow functions are shut off here."""
        self.isolation.clear()
        self.isolation.labels(reached).set(reached.level)

    def store_failed(self) -> None:
        """Count a write that failed."""
        self.store_errors.inc()

    # --- what Prometheus asks -----------------------------------------------------------------

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return everything in the text format that the `Accept` header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Present(Collector):
    """Gauges that are read when asked for; an arm without traffic has no series."""

    def __init__(self, status: Status, registry: Registry) -> None:
        self._status = status
        self._registry = registry

    def collect(self) -> Iterator[GaugeMetricFamily]:
        share = GaugeMetricFamily(
            f"{PREFIX}_allocation_share", "Share of the traffic, 0..1.", labels=("arm", "origin")
        )
        allocation = self._status.allocation
        for arm_id in allocation.arms() if allocation else ():
            arm = self._registry.get(arm_id)
            share.add_metric((arm.name, arm.origin), allocation.share(arm_id) if allocation else 0)
        yield share
        arms = GaugeMetricFamily(
            f"{PREFIX}_arms", "Arms by origin and state.", labels=("origin", "state")
        )
        for (origin, state), count in Tally(
            (a.origin, a.state) for a in self._registry.all()
        ).items():
            arms.add_metric((origin, state), count)
        yield arms
        yield GaugeMetricFamily(
            f"{PREFIX}_synthesis_running",
            "Whether policies are being written now.",
            value=float(self._status.is_synthesizing),
        )
