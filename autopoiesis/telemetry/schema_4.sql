-- Schema version 4: what it took to change a replica, and how well prefix-cache hits are foreseen.

create table reconfigurations (
    began_at               timestamp generated always as
                           (make_timestamp(try_cast(round(began_s * 1e6) as bigint))) virtual,
    replica                varchar not null,
    action                 varchar not null,  -- start, stop, sleep, wake, restart
    seconds                double not null,   -- from the order (the replica being drained) until it served, or was gone
    drain_s                double not null,   -- before that: from its last place in an allocation until it was empty
    import_s               double not null,   -- processes and imports: what is left of the seconds
    load_s                 double not null,   -- weights
    compile_s              double not null,
    capture_s              double not null,   -- of CUDA graphs
    engine_s               double not null,   -- profiling, making the KV cache, warming the engine up
    warmup_s               double not null,   -- how much longer its first answer took than its second
    max_num_seqs           bigint not null,   -- 0: as it was started first
    max_num_batched_tokens bigint not null,
    tensor_parallel        bigint not null,
    error                  varchar not null,  -- why it failed and was taken back, empty if it did not
    began_s                double not null
);

create table prefix_errors (
    window_id bigint not null,
    replica   varchar not null,
    tokens    bigint not null,   -- prompt tokens that the replica looked up
    expected  double not null,   -- share of them that the gateway expected in the cache
    observed  double not null,   -- share that the replica found there
    error     double generated always as (expected - observed) virtual
);
