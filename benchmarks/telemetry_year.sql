-- A year of telemetry, as an instance would have written it; a template for benchmarks/telemetry.py.

insert into windows by name
select w as window_id, (800 + 300 * sin(w / 1000))::bigint as requests, (790 + 300 * sin(w / 1000))::bigint as completed,
    5 as shed, 5 as failed, 0.8 + 0.1 * sin(w / 700) as utility, 0.02 + 0.01 * sin(w / 90) as regret,
    0.02 * w as regret_so_far, 0.0 as regret_low, 0.05 as regret_high, if(w % 977 = 0, 'context', '') as drift, 0.2 as ttft_p50_s, 0.9 as ttft_p99_s,
    0.02 as tpot_p50_s, 0.05 as tpot_p99_s, 70.0 as goodput_rps, 9000.0 as throughput_tokens_s, 0.4 as twin_weight,
    map {{'slo_ttft_s': 1.0, 'slo_tpot_s': 0.1}} as objective,
    map {{'arrival_rate_rps': 80.0 + sin(w / 1000), 'input_tokens_mean': 900.0, 'output_tokens_mean': 200.0,
        'burstiness': 1.1, 'prefix_share': 0.4}} as context,
    {start} + w * {window_s} as started_s, {start} + (w + 1) * {window_s} as ended_s
from range({windows}) as r(w);
insert into cells by name
select w as window_id, c::integer as cell, arms[1 + ((w // 500 + c) % len(arms))] as arm_id,
    ['r' || (2 * c), 'r' || (2 * c + 1)] as replicas, 32 as shards, 0.5 as propensity, 0.8 + 0.05 * c as utility,
    400 as requests, 395 as completed, 3 as shed, 2 as failed, 10 as unfinished, 360000 as input_tokens,
    80000 as output_tokens, 0.2 as ttft_p50_s, 0.9 as ttft_p99_s, 0.02 as tpot_p50_s, 35.0 as goodput_rps,
    20.0 as replica_seconds
from range({windows}) as r(w), range(2) as s(c), arms_there;
insert into allocations by name
select w as window_id, c::integer as cell, arms[1 + ((w // 500 + c) % len(arms))] as arm_id,
    ['r' || (2 * c), 'r' || (2 * c + 1)] as replicas, range(32 * c, 32 * c + 32)::smallint[] as shards, 0.5 as propensity
from range({windows} + 1) as r(w), range(2) as s(c), arms_there;
insert into arm_estimates by name
select w as window_id, unnest(arms) as arm_id, null as observed_utility, 0.8 as twin_utility,
    0.8 + 0.05 * sin(w / 300) as estimate, 0.8 as posterior_mean, 0.02 as posterior_sd, 0.06 as probability
from range({windows}) as r(w), arms_there;
insert into twin_errors by name
select w as window_id, unnest(['ttft_mean_s', 'tpot_mean_s', 'e2e_mean_s', 'utility']) as metric, 0.5 as observed,
    0.5 + 0.05 * sin(w / 50) as twin
from range({windows}) as r(w);
insert into events by name
select if(w % 977 = 0, 'drift', 'allocation') as kind, w as window_id, 'least-requests' as subject,
    'least-requests on 4 replicas' as message, {start} + w * {window_s} as at_s
from range(0, {windows}, 4) as r(w);
insert into syntheses by name
select s as synthesis, s * 720 as window_id, 'regret: 0.05 for 3 windows' as "trigger", 'genetic' as synthesizer,
    24 as candidates, if(s % 10 = 0, [arms[1 + s % len(arms)]], []) as promoted, '' as beaten, 'nothing better' as conclusion, 20.0 as seconds, 30.0 as cpu_seconds,
    0 as tokens, 0.0 as cost_usd, '' as error, {start} + s * 7200 as started_s
from range({windows} // 720) as r(s), arms_there;
insert into candidates by name
select s as synthesis, c::integer as position, '' as arm_id, 'rejected' as verdict,
    ['verify', 'novelty', 'screen', 'race', 'holdout'][1 + c % 5] as gate, -0.1 as gain, -0.2 as gain_low,
    0.0 as gain_high, 'worse than the best incumbent' as reason, [] as parents, '' as thought,
    repeat('return replica.in_flight\n', 10) as source
from range({windows} // 720) as r(s), range(24) as t(c);
insert into requests by name
select 'r' || i as id, (i * {kept_windows} // {requests}) + {windows} - {kept_windows} as window_id, arms[1 + i % 4] as arm_id,
    'r' || (i % 4) as replica, ['completed', 'completed', 'completed', 'shed', 'failed'][1 + (hash(i) % 5)::bigint] as status,
    200 as http_status, 'm' as model, '/v1/chat/completions' as path, true as stream, 900 + (hash(i) % 500)::bigint as input_tokens,
    200 as output_tokens, 512 as max_output_tokens, 256 as cached_tokens, true as usage_counted,
    0.1 + (hash(i) % 1000) / 1000 as ttft_s, 0.02 as tpot_s, 4.0 as e2e_s, 0.0 as held_s, 0.0003 as decision_s,
    0.0 as priority_class, (i % 64)::smallint as shard, i as session, 1 as attempts,
    {start} + ({windows} - {kept_windows} + i * {kept_windows} / {requests}) * {window_s} as arrived_s,
    range(56)::bigint[] as blocks
from range({requests}) as r(i), arms_there;
insert into replicas by name
select 'r' || n as replica, '127.0.0.1:1' as address, true as healthy, 4 as in_flight, 3.0 as running, 1.0 as waiting,
    0.4 as kv_usage, i * 1000.0 as prefix_queries_total, i * 400.0 as prefix_hits_total, 0.0 as preemptions_total,
    {start} + {windows} * {window_s} - 604800 + i as at_s
from range(604800) as r(i), range(4) as s(n);
