import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autopoiesis.telemetry.store import Store

sys.path.insert(0, str(Path(__file__).parent))

from nursery import Nursery


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "telemetry.duckdb") as opened:
        yield opened


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as forking:
        yield forking
