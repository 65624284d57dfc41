-- Schema version 2: every step of every arm is kept, and what an operator has ordered.

create table arm_history (
    happened_at timestamp generated always as
                (make_timestamp(try_cast(round(at_s * 1e6) as bigint))) virtual,
    arm_id      varchar not null,
    state       varchar not null,  -- from then on
    pinned      boolean not null,
    reason      varchar not null,
    at_s        double not null
);

-- Version 1 kept an arm's present state only, but its events told of each step.
insert into arm_history (arm_id, state, pinned, reason, at_s)
with told as (
    select
        arms.id as arm_id,
        split_part(message, ': ', 1) as step,
        substr(message, strpos(message, ': ') + 2) as reason,
        at_s,
        events.rowid as told_as
    from events join arms on arms.name = events.subject
    where events.kind = 'arm'
),
steps as (
    from told
    where step in ('candidate', 'shadow', 'canary', 'live', 'quarantined', 'retired')
),
untold as (
    select
        id as arm_id,
        state as step,
        reason,
        greatest(created_s, epoch(meta.created_at), last.at_s) as at_s,
        null as told_as  -- after what was told
    from arms cross join meta
    left join (
        select arm_id, arg_max(step, at_s) as step, max(at_s) as at_s from steps group by arm_id
    ) as last on last.arm_id = arms.id
    where arms.state is distinct from last.step
)
select arm_id, step, false, reason, at_s
from (from steps union all from untold)
order by at_s, told_as nulls last;

create table guard_rails (
    changed_at timestamp generated always as
               (make_timestamp(try_cast(round(at_s * 1e6) as bigint))) virtual,
    frozen     boolean not null,
    dry_run    boolean not null,
    human_only boolean not null,
    only_arm   varchar not null,  -- id of the arm that has all traffic, empty for none
    held       varchar not null,  -- allocation that stays while frozen or in dry run: JSON, empty for none
    reason     varchar not null,  -- who changed it, and why
    at_s       double not null
);

alter table arms add column slow varchar default '';  -- source of the slow functions
alter table arms alter column slow set not null;
