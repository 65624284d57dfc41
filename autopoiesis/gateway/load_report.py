"""The load that a replica reports in the headers of an answer, where its engine can.

vLLM does for plain answers when a request asks for it (ORCA, https://docs.vllm.ai: `endpoint-load-metrics`):
`TEXT named_metrics.kv_cache_usage_perc=0.4, named_metrics.num_requests_waiting=3`. It is as new as the answer,
where `/metrics` is up to half a second old.
"""

from typing import NamedTuple

ASK_HEADER, ASK_VALUE = "endpoint-load-metrics-format", "TEXT"
TOLD_HEADER = "endpoint-load-metrics"
_PREFIX = "named_metrics."
LONGEST = 1000
"""Characters of a report that are read."""


class LoadReport(NamedTuple):
    """What a replica says of its load; None where it does not."""

    waiting: float | None
    kv_usage: float | None


def read_load(text: str) -> LoadReport | None:
    """Read the header's value; None if it is no report, or tells nothing that is known."""
    kind, _, told = text[:LONGEST].partition(" ")
    if kind != ASK_VALUE:
        return None
    values: dict[str, float] = {}
    for part in told.split(","):
        name, _, value = part.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            continue
        if 0.0 <= number < float("inf"):
            values[name.removeprefix(_PREFIX)] = number
    report = LoadReport(values.get("num_requests_waiting"), values.get("kv_cache_usage_perc"))
    return report if any(value is not None for value in report) else None
