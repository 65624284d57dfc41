-- Schema version 1. Times are Unix seconds (columns *_s, exact) with a readable twin in UTC
-- (columns *_at, computed when read). `window` is a reserved word of SQL, hence `window_id`.
-- Nothing here ever holds the content of a prompt or of an answer.

create table meta (
    schema_version integer not null,
    engine_version varchar not null,  -- DuckDB that made the file
    created_at     timestamp not null
);

create table requests (
    id                varchar not null,
    arrived_at        timestamp generated always as
                      (make_timestamp(try_cast(round(arrived_s * 1e6) as bigint))) virtual,
    window_id         bigint not null,
    arm_id            varchar not null,
    replica           varchar not null,
    status            varchar not null,
    http_status       smallint not null,
    model             varchar not null,
    path              varchar not null,
    stream            boolean not null,
    input_tokens      bigint not null,
    output_tokens     bigint not null,
    max_output_tokens bigint not null,
    cached_tokens     bigint not null,
    usage_counted     boolean not null,
    ttft_s            double,
    tpot_s            double,
    e2e_s             double not null,
    held_s            double not null,
    decision_s        double not null,
    priority_class    double not null,
    shard             smallint not null,
    session           bigint not null,
    attempts          integer not null,
    arrived_s         double not null,
    blocks            bigint[] not null
);

create table windows (
    window_id           bigint not null,
    started_at          timestamp generated always as
                        (make_timestamp(try_cast(round(started_s * 1e6) as bigint))) virtual,
    requests            bigint not null,
    completed           bigint not null,
    shed                bigint not null,
    failed              bigint not null,
    utility             double,
    regret              double,
    regret_low          double,
    regret_high         double,
    drift               varchar not null,
    ttft_p50_s          double,
    ttft_p99_s          double,
    tpot_p50_s          double,
    tpot_p99_s          double,
    goodput_rps         double not null,
    throughput_tokens_s double not null,
    twin_weight         double not null,
    objective           map(varchar, double) not null,
    context             map(varchar, double) not null,
    started_s           double not null,
    ended_s             double not null
);

create table cells (
    window_id       bigint not null,
    cell            integer not null,
    arm_id          varchar not null,
    replicas        varchar[] not null,
    shards          integer not null,
    share           double generated always as (shards / 64) virtual,
    propensity      double not null,
    utility         double,
    requests        bigint not null,
    completed       bigint not null,
    shed            bigint not null,
    failed          bigint not null,
    unfinished      bigint not null,
    input_tokens    bigint not null,
    output_tokens   bigint not null,
    ttft_p50_s      double,
    ttft_p99_s      double,
    tpot_p50_s      double,
    goodput_rps     double not null,
    replica_seconds double not null
);

create table arms (
    id         varchar not null,
    name       varchar not null,
    origin     varchar not null,
    state      varchar not null,
    reason     varchar not null,
    pinned     boolean not null,
    parents    varchar[] not null,
    created_at timestamp generated always as
               (make_timestamp(try_cast(round(created_s * 1e6) as bigint))) virtual,
    created_s  double not null,
    thought    varchar not null,
    source     varchar not null
);

create table arm_estimates (
    window_id        bigint not null,
    arm_id           varchar not null,
    observed_utility double,
    twin_utility     double,
    estimate         double,
    posterior_mean   double not null,
    posterior_sd     double not null,
    probability      double not null
);

create table allocations (
    window_id  bigint not null,
    cell       integer not null,
    arm_id     varchar not null,
    replicas   varchar[] not null,
    shards     smallint[] not null,
    share      double generated always as (len(shards) / 64) virtual,
    propensity double not null
);

create table syntheses (
    synthesis   bigint not null,
    started_at  timestamp generated always as
                (make_timestamp(try_cast(round(started_s * 1e6) as bigint))) virtual,
    window_id   bigint not null,
    "trigger"   varchar not null,
    synthesizer varchar not null,
    candidates  integer not null,
    promoted    varchar[] not null,
    beaten      varchar not null,  -- arm over which the gains are
    conclusion  varchar not null,
    seconds     double not null,
    cpu_seconds double not null,
    tokens      bigint not null,
    cost_usd    double not null,
    error       varchar not null,
    started_s   double not null
);

create table candidates (
    synthesis bigint not null,
    position  integer not null,
    arm_id    varchar not null,
    verdict   varchar not null,
    gate      varchar not null,
    gain      double,
    gain_low  double,
    gain_high double,
    reason    varchar not null,
    parents   varchar[] not null,
    thought   varchar not null,
    source    varchar not null
);

create table replicas (
    sampled_at           timestamp generated always as
                         (make_timestamp(try_cast(round(at_s * 1e6) as bigint))) virtual,
    replica              varchar not null,
    address              varchar not null,
    healthy              boolean not null,
    in_flight            integer not null,
    running              double not null,
    waiting              double not null,
    kv_usage             double not null,
    prefix_queries_total double not null,
    prefix_hits_total    double not null,
    preemptions_total    double not null,
    at_s                 double not null
);

create table plans (
    window_id  bigint not null,   -- from this window on
    arm_id     varchar not null,  -- who proposed it
    outcome    varchar not null,  -- applied, kept the old one, failed
    plan       varchar not null,  -- JSON
    created_s  double not null
);

create table twin_errors (
    window_id bigint not null,
    metric    varchar not null,
    observed  double not null,
    twin      double not null,
    error     double generated always as (twin - observed) virtual
);

create table events (
    happened_at timestamp generated always as
                (make_timestamp(try_cast(round(at_s * 1e6) as bigint))) virtual,
    kind        varchar not null,
    window_id   bigint not null,
    subject     varchar not null,
    message     varchar not null,
    at_s        double not null
);

create table bandit_state (
    name      varchar not null,
    window_id bigint not null,  -- the window that wrote it
    dtype     varchar not null, -- numpy's name with byte order: <f8, <i8 ...
    shape     bigint[] not null,
    data      blob not null     -- C order
);
