"""How well the gateway foresees prefix-cache hits: its estimates against the replicas' own counters."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from autopoiesis.gateway.link import Batch
from autopoiesis.telemetry.records import PrefixErrorRow, ReplicaSample, RequestRecord


def prefix_errors(window: int, batches: Sequence[Batch]) -> list[PrefixErrorRow]:
    """Compare what came in during a window, replica by replica.

    The gateway expects hits when it sends a request, the replica counts them when it takes the request up;
    a request near the window's ends may be in one and not in the other.
    """
    samples = _by_replica(s for batch in batches for s in batch.replicas)
    expected = _expected(r for batch in batches for r in batch.requests)
    rows: list[PrefixErrorRow] = []
    for replica, seen in samples.items():
        queries, hits = _grown(seen)
        if queries > 0.0 and replica in expected:
            share = expected[replica]
            rows.append(PrefixErrorRow(window, replica, round(queries), share, hits / queries))
    return rows


def _by_replica(samples: Iterable[ReplicaSample]) -> dict[str, list[ReplicaSample]]:
    found: dict[str, list[ReplicaSample]] = {}
    for sample in samples:
        found.setdefault(sample.replica, []).append(sample)
    return found


def _grown(samples: Sequence[ReplicaSample]) -> tuple[float, float]:
    """Return how far the counters of queries and hits have grown; a restart sets them to 0 in between."""
    queries = hits = 0.0
    for before, after in pairwise(samples):
        if after.prefix_queries_total >= before.prefix_queries_total:
            queries += after.prefix_queries_total - before.prefix_queries_total
            hits += max(after.prefix_hits_total - before.prefix_hits_total, 0.0)
    return queries, min(hits, queries)


def _expected(requests: Iterable[RequestRecord]) -> dict[str, float]:
    """Return the share of prompt tokens that was expected in each replica's cache."""
    tokens: dict[str, int] = {}
    cached: dict[str, int] = {}
    for request in requests:
        if request.replica and request.input_tokens > 0:
            name = request.replica
            tokens[name] = tokens.get(name, 0) + request.input_tokens
            cached[name] = cached.get(name, 0) + min(request.cached_tokens, request.input_tokens)
    return {name: cached[name] / count for name, count in tokens.items()}
