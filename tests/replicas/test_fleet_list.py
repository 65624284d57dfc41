"""A list of replicas that somebody else keeps is read line by line; what is wrong is told with its line."""

import pytest

from autopoiesis.replicas.fleet_list import FleetListError, Listed, read_fleet_list, resolve


def test_lines_name_replicas_with_what_is_known_of_them(tmp_path):
    path = tmp_path / "fleet"
    path.write_text(
        "# the west wing\n\nhttp://10.0.0.1:8000  # old\n10.0.0.2:8000/v1 speed=0.5 leaving\n"
        "http://10.0.0.1:8000 profile=p kv_events=tcp://10.0.0.1:5557\n"
    )
    assert read_fleet_list(path) == (
        Listed("http://10.0.0.1:8000", "p", kv_events="tcp://10.0.0.1:5557"),
        Listed("http://10.0.0.2:8000", speed=0.5, leaving=True),
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("https://10.0.0.1", "line 1: https://10.0.0.1: only http"),
        ("10.0.0.1:8000 fast", "line 1: 'fast' is not understood"),
        ("10.0.0.1:8000 speed=0", "speed=0"),
        ("10.0.0.1:8000 speed=x", "speed=x"),
        ("10.0.0.1:8000 kv_events=tcp://*:5557", "kv_events=tcp://HOST:PORT"),
    ],
)
def test_a_line_that_is_none_is_told(tmp_path, line, says):
    path = tmp_path / "fleet"
    path.write_text(line)
    with pytest.raises(FleetListError, match=says):
        read_fleet_list(path)


def test_a_list_that_is_missing_is_told(tmp_path):
    with pytest.raises(FleetListError, match="cannot be read: No such file"):
        read_fleet_list(tmp_path / "none")


async def test_a_name_stands_for_a_replica_at_each_of_its_addresses():
    assert Listed("http://127.0.0.1:8000") in await resolve("dns://localhost:8000")
    with pytest.raises(FleetListError, match="cannot be resolved"):
        await resolve("dns://no-such-host.invalid:8000")
    with pytest.raises(FleetListError, match="give one like dns://"):
        await resolve("dns://localhost")
