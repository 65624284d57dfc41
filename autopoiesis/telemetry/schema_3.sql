-- Schema version 3: what has been written to the history, and which views the file has.

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
