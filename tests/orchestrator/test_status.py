"""What the controller keeps of now, whoever asks for it."""

import sys
from dataclasses import replace

from test_metrics import batch, request

from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.status import RECENT_S, Status
from autopoiesis.telemetry.store import Store


def test_what_has_ended_long_ago_is_let_go_even_if_nobody_ever_looks(tmp_path):
    with Store.open(tmp_path / "telemetry.duckdb") as store:
        now = [0.0]
        status = Status(Settings(), Registry(store), lambda: now[0])
        old = request()
        alone = sys.getrefcount(old)
        status.saw(replace(batch(), requests=(old,)))
        assert sys.getrefcount(old) > alone

        now[0] = RECENT_S + 1.0
        status.saw(replace(batch(), requests=(request(),)))
        assert sys.getrefcount(old) == alone
