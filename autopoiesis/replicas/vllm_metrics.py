"""A replica's metrics under vLLM's names and types."""

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from autopoiesis.twin.engine import Engine

_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_PER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

FINISH_REASONS = ("stop", "length", "abort")


class Histogram:
    """Counts per bucket; `observe` is a bisection, since it is called for every token."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        """Write the cumulative buckets."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, self._sum)


class ReplicaMetrics(Collector):
    """What one engine has done, collected when asked for."""

    def __init__(self, engine: Engine, model: str) -> None:
        """Collect for `engine`; the caller counts what the engine does not."""
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self.first_token = Histogram(_FIRST_TOKEN)
        self.inter_token = Histogram(_PER_TOKEN)
        self.per_output_token = Histogram(_PER_TOKEN)
        self.e2e = Histogram(_REQUEST)
        self.queue = Histogram(_REQUEST)
        self.request_prompt = Histogram(_TOKENS)
        self.request_generation = Histogram(_TOKENS)
        self._engine = engine
        self._labels = (model, "0")

    def registry(self) -> CollectorRegistry:
        """Return a registry of its own that holds these metrics."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry

    def collect(self) -> Iterator[Metric]:
        """Yield the families as they stand."""
        engine = self._engine
        yield self._gauge("num_requests_running", "Requests in the batch", engine.running)
        yield self._gauge("num_requests_waiting", "Requests waiting", engine.waiting)
        yield self._gauge("kv_cache_usage_perc", "KV cache in use, 1 = all", engine.kv_usage)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up", engine.prefix_queries
        )
        yield self._counter("prefix_cache_hits", "Prompt tokens found", engine.prefix_hits)
        yield self._counter("num_preemptions", "Preemptions", engine.preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens processed", self.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated", self.generation_tokens)
        yield self._finished()
        yield self._histogram("time_to_first_token_seconds", self.first_token)
        yield self._histogram("inter_token_latency_seconds", self.inter_token)
        yield self._histogram("request_time_per_output_token_seconds", self.per_output_token)
        yield self._histogram("e2e_request_latency_seconds", self.e2e)
        yield self._histogram("request_queue_time_seconds", self.queue)
        yield self._histogram("request_prompt_tokens", self.request_prompt)
        yield self._histogram("request_generation_tokens", self.request_generation)
        yield self._cache_config()

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", what, labels=("model_name", "engine"))
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", what, labels=("model_name", "engine"))
        family.add_metric(self._labels, value)
        return family

    def _finished(self) -> Metric:
        labels = ("model_name", "engine", "finished_reason")
        family = CounterMetricFamily("vllm:request_success", "Requests finished", labels=labels)
        for reason, count in self.finished.items():
            family.add_metric((*self._labels, reason), count)
        return family

    def _histogram(self, name: str, histogram: Histogram) -> Metric:
        what = name.replace("_", " ")
        family = HistogramMetricFamily(f"vllm:{name}", what, labels=("model_name", "engine"))
        histogram.add_to(family, self._labels)
        return family

    def _cache_config(self) -> Metric:
        profile = self._engine.profile
        values = {
            "block_size": str(profile.kv_block_tokens),
            "enable_prefix_caching": "True",
            "num_gpu_blocks": str(profile.kv_blocks),
            "engine": "0",
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "KV cache", labels=tuple(values))
        family.add_metric(tuple(values.values()), 1.0)
        return family
