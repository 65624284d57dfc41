"""What replicas are to do and what was done to them survives in two files, whole or not at all."""

import pytest

from autopoiesis.replicas.limits import Limits, LimitsError, with_limits
from autopoiesis.replicas.targets import ChangeLog, Target, TargetFile, Want
from autopoiesis.telemetry.records import Reconfiguration
from autopoiesis.twin.latency import profile


def test_targets_are_read_as_they_were_written(tmp_path):
    file = TargetFile(tmp_path / "targets.json")
    assert file.read() == {}
    targets = {"a": Target(Want.OFF), "b": Target(Want.ON, Limits(8, 512, 2), 3)}
    file.write(targets)
    assert file.read() == targets


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"want": "up"}}'])
def test_targets_that_cannot_be_read_are_none(tmp_path, text):
    path = tmp_path / "targets.json"
    path.write_text(text)
    assert TargetFile(path).read() == {}


def change(n):
    return Reconfiguration(f"r{n}", "start", 100.0 + n, 1.5, load_s=0.5)


def test_a_change_is_heard_once_and_a_line_that_is_not_whole_waits(tmp_path):
    path = tmp_path / "changes.jsonl"
    written, read = ChangeLog(path), ChangeLog(path)
    assert read.new() == []
    written.append(change(0))
    written.append(change(1))
    assert read.new() == [change(0), change(1)]
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"replica": "r2", ')
    assert read.new() == []
    path.write_bytes(whole)
    written.append(change(2))
    assert read.new() == [change(2)]


def test_another_reader_goes_on_where_the_one_before_it_was(tmp_path):
    path = tmp_path / "changes.jsonl"
    written, first = ChangeLog(path), ChangeLog(path)
    written.append(change(0))
    first.new()
    written.append(change(1))
    second = ChangeLog(path)
    second.skip(*first.heard)
    assert second.new() == [change(1)]
    path.unlink()  # `serve` was started again
    written.append(change(5))
    third = ChangeLog(path)
    third.skip(*second.heard)
    assert third.new() == [change(5)]


def test_limits_fall_back_on_others_and_bound_a_profile():
    assert Limits(8).over(Limits(16, 512)) == Limits(8, 512)
    of = profile("h100-llama-3-8b-tp1-bf16")
    assert with_limits(of, Limits()) == of
    assert with_limits(of, Limits(8)).max_num_seqs == 8
    assert str(Limits(8, 512)) == "max_num_seqs 8, max_num_batched_tokens 512"
    with pytest.raises(LimitsError, match="max_num_seqs must be a whole number"):
        Limits(-1)
