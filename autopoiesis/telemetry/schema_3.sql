-- Schema version 3: what has been written to the history, which views the file has, what was asked and answered when
-- an arm was written, and what each candidate cost.

create table sealed (
    name      varchar not null,   -- table whose rows these are
    hour_at   timestamp generated always as
              (make_timestamp(try_cast(round(hour_s * 1e6) as bigint))) virtual,
    part      integer not null,   -- 1; more where rows of an hour came after the others were forgotten
    rows      bigint not null,
    file      varchar not null,   -- below the data directory
    forgotten boolean not null,   -- the rows are in the file only
    hour_s    double not null
);

alter table meta add column views varchar default '';  -- hash of the statements that made the views
alter table meta alter column views set not null;

alter table arms add column prompt varchar default '';  -- what its author was asked, empty for none
alter table arms alter column prompt set not null;
alter table arms add column answer varchar default '';  -- and what it answered
alter table arms alter column answer set not null;

alter table candidates add column slow varchar default '';  -- source of its slow functions
alter table candidates alter column slow set not null;
alter table candidates add column model varchar default '';  -- language model that wrote it
alter table candidates alter column model set not null;
alter table candidates add column tokens bigint default 0;  -- its part of the answer's
alter table candidates alter column tokens set not null;
alter table candidates add column cost_usd double default 0;
alter table candidates alter column cost_usd set not null;

alter table syntheses add column since_window bigint;  -- first window of what it answers; null for one by hand

-- What a plan cost, as measured.
alter table plans add column scheduling_s double default 0;  -- what the fleet waited for the policy
alter table plans add column cpu_s double default 0;         -- CPU time that the policy took
alter table plans add column stale_s double;                 -- from the question until it was carried out
alter table plans add column idle_replica_s double;          -- replicas were there and served nobody
alter table plans add column finished_s double;

alter table windows add column regret_so_far double default 0.0;  -- sum over all windows up to this one
update windows set regret_so_far = sums.so_far
from (
    select window_id, coalesce(sum(regret) over (order by window_id), 0.0) as so_far from windows
) as sums
where windows.window_id = sums.window_id;
