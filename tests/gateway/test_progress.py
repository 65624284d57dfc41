"""How many tokens of a running stream have come, told from what its replica reports."""

import pytest

from autopoiesis.gateway.progress import Progress


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def progress(now):
    return Progress(2, lambda: now[0])


def test_a_stream_has_its_share_of_what_its_replica_has_generated(progress, now):
    progress.reported(0, 1000.0, 4.0)
    now[0] = 0.5
    progress.reported(0, 1040.0, 4.0)
    began = progress.tokens(0)
    now[0] = 1.0
    progress.reported(0, 1060.0, 6.0)

    assert progress.tokens(0) - began == pytest.approx(20.0 / 5.0)
    assert progress.tokens(1) == 0.0


def test_between_two_reports_it_goes_on_as_before(progress, now):
    progress.reported(0, 0.0, 2.0)
    now[0] = 1.0
    progress.reported(0, 40.0, 2.0)
    now[0] = 1.25

    assert progress.tokens(0) == pytest.approx(25.0)


def test_a_replica_that_began_anew_takes_nothing_away(progress, now):
    progress.reported(0, 500.0, 1.0)
    now[0] = 1.0
    progress.reported(0, 520.0, 1.0)
    now[0] = 2.0
    progress.reported(0, 3.0, 1.0)
    assert progress.tokens(0) == pytest.approx(20.0)

    progress.forget(0)
    assert progress.tokens(0) == progress.tokens(-1) == 0.0
