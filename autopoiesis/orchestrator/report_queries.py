"""What a report asks the telemetry. `{windows}` and `{happened}` are conditions of its span.

`{every}` windows make a point of a curve, counted from window `{first}`; `{blocks}` blocks make up its
`{count}` windows.
"""

TOTALS = """
    select min(started_s) as since_s, max(ended_s) as until_s, arg_max(objective, window_id) as objective,
        count(*) as windows, sum(requests)::bigint as requests, sum(completed)::bigint as completed,
        sum(shed)::bigint as shed, sum(failed)::bigint as failed,
        sum(utility * requests) / nullif(sum(requests) filter (utility is not null), 0) as utility,
        avg(regret) as regret, avg(regret_low) as regret_low, avg(regret_high) as regret_high,
        sum(goodput_rps * (ended_s - started_s)) / nullif(sum(ended_s - started_s), 0) as goodput_rps,
        sum(throughput_tokens_s * (ended_s - started_s)) / nullif(sum(ended_s - started_s), 0) as throughput_tokens_s,
        count(*) filter (drift <> '') as drifted
    from windows where {windows}"""

GAINS = """
    with played as (
        select window_id, arm_id, sum(requests) as requests from cells
        where {windows} and requests > 0 group by all
    ),
    served as (
        select window_id, sum(estimate * requests) / sum(requests) as earned, sum(requests) as requests
        from played join arm_estimates using (window_id, arm_id)
        where {windows} and estimate is not null group by window_id
    )
    select e.arm_id, any_value(m.name) as name, (e.window_id - {first}) * {blocks} // {count} as block,
        sum(s.requests * (s.earned - e.estimate)) as difference, sum(s.requests)::bigint as requests,
        count(*) as windows
    from arm_estimates as e join served as s using (window_id) join arms as m on m.id = e.arm_id
    where {windows} and e.estimate is not null and m.origin = 'human'
    group by e.arm_id, block order by e.arm_id, block"""

ARMS = """
    with served as (
        select arm_id, count(distinct window_id) as windows, sum(requests)::bigint as requests,
            sum(utility * requests) / nullif(sum(requests) filter (utility is not null), 0) as utility,
            sum(replica_seconds) as replica_seconds
        from cells where {windows} group by arm_id
    ),
    believed as (
        select arm_id, avg(estimate) as estimate from arm_estimates where {windows} group by arm_id
    )
    select m.id, m.name, m.origin, m.state, m.reason, m.parents,
        coalesce(s.windows, 0) as windows, coalesce(s.requests, 0) as requests,
        coalesce(s.requests / nullif(sum(s.requests) over (), 0), 0) as share,
        s.utility, b.estimate, coalesce(s.replica_seconds, 0) as replica_seconds
    from arms as m left join served as s on s.arm_id = m.id left join believed as b on b.arm_id = m.id
    where s.windows > 0 or b.estimate is not null
    order by requests desc, m.name"""

SYNTHESES = """
    select s.synthesis, s.started_at, s."trigger", s.synthesizer, s.candidates,
        (select list(name order by name) from arms where list_contains(s.promoted, id)) as promoted,
        s.conclusion, s.seconds, s.cpu_seconds, s.tokens, s.cost_usd, s.error
    from syntheses as s where {windows} order by s.synthesis"""

GATES = """
    select c.gate, count(*) as candidates, max(c.gain) as best_gain
    from candidates as c join syntheses as s using (synthesis) where s.{windows}
    group by all order by candidates desc, c.gate"""

DRIFT = """
    select window_id, started_at, drift from windows where {windows} and drift <> ''
    order by window_id"""

EVENTS = """
    select happened_at, kind, subject, message from events where {happened} and kind <> 'allocation'
    order by at_s desc limit 200"""

REPLICAS = """
    with sampled as (
        select replica, avg(healthy::int) as healthy, avg(running) as running, avg(waiting) as waiting,
            avg(kv_usage) as kv_usage, max(kv_usage) as kv_usage_max,
            (max(prefix_hits_total) - min(prefix_hits_total))
                / nullif(max(prefix_queries_total) - min(prefix_queries_total), 0) as hit_rate
        from replicas where {happened} group by replica
    ),
    answered as (
        select replica, count(*) as requests, count(*) filter (status = 'failed') as failed,
            median(ttft_s) as ttft_p50_s
        from requests where {windows} and replica <> '' group by replica
    )
    select replica, coalesce(requests, 0) as requests, coalesce(failed, 0) as failed, ttft_p50_s, healthy, running,
        waiting, kv_usage, kv_usage_max, hit_rate
    from sampled full join answered using (replica) order by replica"""

TWIN = """
    select metric, count(*) as windows, avg(observed) as observed, avg(error) as bias,
        avg(abs(error)) as mean_error
    from twin_errors where {windows} group by metric order by metric"""

COURSE = """
    select (window_id - {first}) // {every} as point, min(started_s) as started_s, max(ended_s) as ended_s,
        sum(requests) / nullif(sum(ended_s - started_s), 0) as requests_rps, avg(goodput_rps) as goodput_rps,
        avg(utility) as utility, avg(regret) as regret, avg(regret_low) as regret_low, avg(regret_high) as regret_high,
        avg(ttft_p50_s) as ttft_p50_s, avg(ttft_p99_s) as ttft_p99_s,
        avg(tpot_p50_s) as tpot_p50_s, avg(tpot_p99_s) as tpot_p99_s, bool_or(drift <> '') as drifted
    from windows where {windows} group by point order by point"""

SHARES = """
    with counted as (
        select (window_id - {first}) // {every} as point, count(*) as n from windows where {windows} group by point
    )
    select point, arm_id, sum(share) / any_value(n) as share
    from (select (window_id - {first}) // {every} as point, arm_id, share from allocations
        where {windows} and window_id in (select window_id from windows where {windows}))
    join counted using (point) group by point, arm_id order by point, arm_id"""
