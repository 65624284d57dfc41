import pytest
from evaluation_scenes import write_traces


@pytest.fixture(scope="session")
def traces(tmp_path_factory):
    return write_traces(tmp_path_factory.mktemp("traces"))
