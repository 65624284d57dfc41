import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stack import Stack, running_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Three replicas, Envoy and a picker; whoever breaks something mends it."""
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running
