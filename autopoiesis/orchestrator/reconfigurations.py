"""What changes of replicas have taken on this fleet: the twin's figures for those to come."""

from collections.abc import Callable

from autopoiesis.orchestrator.plan_features import Durations
from autopoiesis.telemetry.query import QueryError, QueryResult
from autopoiesis.telemetry.store import Store, TelemetryError

RECENT = 20
"""Changes of which the median counts."""
_STARTS = f"""
    select median(load_s), median(import_s + compile_s + capture_s + engine_s), median(warmup_s)
    from (
        from reconfigurations where action in ('start', 'restart', 'wake') and error = ''
        order by began_s desc limit {RECENT}
    )"""  # noqa: S608 - our own number
_STOPS = f"""
    select median(seconds) from (
        from reconfigurations where action in ('stop', 'sleep') and error = ''
        order by began_s desc limit {RECENT}
    )"""  # noqa: S608
_DRAINS = f"""
    select median(drain_s) from (
        from reconfigurations where drain_s > 0.0 order by began_s desc limit {RECENT}
    )"""  # noqa: S608

Ask = Callable[[str], QueryResult]


def durations_of(ask: Ask, assumed: Durations) -> Durations:
    """Return medians of the newest changes, and what is assumed of those that there were none of.

    Raises:
        QueryError, TelemetryError: the telemetry cannot be read.
    """
    load_s, engine_s, warmup_s = ask(_STARTS).rows[0]
    ((stop_s,),), ((drain_s,),) = ask(_STOPS).rows, ask(_DRAINS).rows
    started = load_s is not None
    return Durations(
        load_s=load_s if started else assumed.load_s,
        engine_s=engine_s if started else assumed.engine_s,
        warmup_s=warmup_s if started else assumed.warmup_s,
        drain_s=assumed.drain_s if drain_s is None else drain_s,
        stop_s=assumed.stop_s if stop_s is None else stop_s,
    )


def measured_durations(store: Store) -> Durations:
    """Return what is known from earlier runs; assumptions where that cannot be read."""
    try:
        return durations_of(store.query, Durations())
    except (QueryError, TelemetryError):
        return Durations()
