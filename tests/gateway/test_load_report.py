"""Load that a replica reports with an answer is used as it is told, and rubbish is not."""

import pytest
from envoy.data.accesslog.v3 import accesslog_pb2
from test_state import make

from autopoiesis.arms import fleet
from autopoiesis.gateway.access_log import read_entry
from autopoiesis.gateway.load_report import LoadReport, read_load
from autopoiesis.gateway.settings import INFERENCE_ROUTE


@pytest.mark.parametrize(
    ("text", "report"),
    [
        (
            "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3.0",
            LoadReport(3.0, 0.25),
        ),
        ("TEXT named_metrics.num_requests_waiting=3", LoadReport(3.0, None)),
        ("TEXT named_metrics.num_requests_waiting=nan", None),
        ("TEXT named_metrics.num_requests_waiting=-1,x=y,,=", None),
        ('JSON {"named_metrics": {}}', None),
        ("", None),
        ("TEXT", None),
    ],
)
def test_a_report_is_read(text, report):
    assert read_load(text) == report


def test_the_access_log_brings_it_to_the_replica_s_row():
    entry = accesslog_pb2.HTTPAccessLogEntry()
    entry.common_properties.route_name = INFERENCE_ROUTE
    entry.response.response_code.value = 200
    assert read_entry(entry).load is None
    told = "TEXT named_metrics.num_requests_waiting=7"
    entry.response.response_headers["endpoint-load-metrics"] = told
    state = make(2)
    state.membership.report("r1", 1.0, 2.0, 0.5)
    state.membership.report_load(state.membership.at_address("127.0.0.1:2"), read_entry(entry).load)
    row = state.membership.fleet.replica[1]
    assert (row[fleet.RUNNING], row[fleet.WAITING], row[fleet.KV_USAGE]) == (1.0, 7.0, 0.5)
    state.membership.report_load(-1, LoadReport(9.0, 9.0))
