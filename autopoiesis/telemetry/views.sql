-- The views are the promise to people: their columns stay, the tables below them may change.
-- They are made anew by the first start after they have changed.

create or replace view arm_scores as
with latest as (
    select arm_id, sum(share) as share
    from allocations
    where window_id = (select max(window_id) from allocations)
    group by arm_id
),
served as (
    select
        arm_id,
        count(distinct window_id) as windows,
        sum(requests) as requests,
        sum(utility * counted) / nullif(sum(counted), 0) as utility,
        sum(replica_seconds) as replica_seconds
    from (
        select *, if(utility is null, 0, completed + shed + failed) as counted
        from cells
        where window_id > (select max(window_id) - 10_000 from windows)
    )
    group by arm_id
),
believed as (
    select arm_id, posterior_mean, posterior_sd, probability
    from arm_estimates
    where window_id = (select max(window_id) from arm_estimates)
)
select
    m.id,
    m.name,
    m.origin,
    m.state,
    coalesce(l.share, 0) as traffic_share,
    s.utility,
    b.posterior_mean,
    b.posterior_sd,
    b.probability,
    coalesce(s.windows, 0) as windows,
    coalesce(s.requests, 0)::bigint as requests,
    coalesce(s.replica_seconds, 0) as replica_seconds,
    m.parents,
    m.created_at,
    m.reason,
    case when m.slow = '' then 'fast' when m.source = '' then 'slow' else 'both' end as kind
from arms as m
left join latest as l on l.arm_id = m.id
left join served as s on s.arm_id = m.id
left join believed as b on b.arm_id = m.id;

create or replace view window_summary as
select
    w.window_id,
    w.started_at,
    w.ended_s - w.started_s as seconds,
    w.requests,
    w.requests / nullif(w.ended_s - w.started_s, 0) as requests_rps,
    w.goodput_rps,
    w.utility,
    w.regret,
    w.drift,
    w.ttft_p50_s,
    w.ttft_p99_s,
    w.tpot_p50_s,
    w.tpot_p99_s,
    w.completed,
    w.shed,
    w.failed,
    w.throughput_tokens_s
from windows as w;

create or replace view regret_over_time as
select
    window_id,
    started_at,
    regret,
    regret_low,
    regret_high,
    regret_so_far,
    utility,
    drift
from windows;

create or replace view allocation_history as
select
    a.window_id,
    w.started_at,
    a.cell,
    a.arm_id,
    m.name,
    m.origin,
    a.replicas,
    a.share,
    a.propensity,
    c.requests,
    c.utility as reward
from allocations as a
left join windows as w on w.window_id = a.window_id
left join arms as m on m.id = a.arm_id
left join cells as c on c.window_id = a.window_id and c.cell = a.cell;

-- Why the traffic of window w went where it went: each arm's share before and after, and what
-- the window before said of it.
create or replace macro why(w) as table
with shares as (
    select
        arm_id,
        coalesce(sum(share) filter (window_id = w - 1), 0) as share_before,
        coalesce(sum(share) filter (window_id = w), 0) as share
    from allocations
    where window_id between w - 1 and w
    group by arm_id
),
rewards as (
    select arm_id, avg(utility) as reward from cells where window_id = w - 1 group by arm_id
)
select
    m.name,
    s.share_before,
    s.share,
    r.reward,
    e.twin_utility,
    e.estimate,
    e.posterior_mean,
    e.posterior_sd,
    e.probability,
    m.state,
    m.reason,
    p.drift,
    (
        select list(kind || ': ' || message order by at_s)
        from events
        where window_id between w - 1 and w and (subject = m.id or subject = m.name)
    ) as events
from arms as m
left join shares as s on s.arm_id = m.id
left join rewards as r on r.arm_id = m.id
left join arm_estimates as e on e.arm_id = m.id and e.window_id = w - 1
left join windows as p on p.window_id = w - 1
where s.arm_id is not null or e.arm_id is not null
order by s.share desc nulls last, m.name;

-- How long it took from a change in the traffic until what was written in answer had traffic.
create or replace view time_to_traffic as
with promotions as (
    select synthesis, window_id, unnest(promoted) as arm_id from syntheses
),
served as (
    select p.synthesis, min(a.window_id) as first_window
    from promotions as p join allocations as a on a.arm_id = p.arm_id and a.window_id > p.window_id
    group by p.synthesis
)
select
    s.synthesis,
    s."trigger",
    s.synthesizer,
    s.promoted,
    shift.started_at as shifted_at,
    s.started_s - shift.started_s as to_trigger_s,
    s.seconds as writing_s,
    served.first_window,
    first.started_s - (s.started_s + s.seconds) as waiting_s,
    first.started_s - shift.started_s as to_first_traffic_s
from syntheses as s
left join served on served.synthesis = s.synthesis
left join windows as shift on shift.window_id = s.since_window
left join windows as first on first.window_id = served.first_window
order by s.synthesis;
