"""The control API of a real controller process: what it answers, to whom, and what it makes of nonsense."""

import json
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import pytest
from controller_process import Controlled, controlled
from gateway_process import run, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.control import control_app
from autopoiesis.orchestrator.control_access import TOKEN_FILE, Access, is_loopback, write_token
from autopoiesis.orchestrator.control_bodies import NewArmBody
from autopoiesis.orchestrator.control_contract import ROUTES, ErrorAnswer, Route
from autopoiesis.orchestrator.metrics import Metrics
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.status import Status
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow
from autopoiesis.telemetry.store import Store

POLICY = "# tried by hand\ndef score(request, replica, fleet):\n    return replica.in_flight * {}\n"
BY_NAME = {route.name: route for route in ROUTES}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controlled]:
    with controlled(tmp_path_factory.mktemp("control"), window_s=600.0) as running:
        yield running


def answered(response: httpx.Response, name: str) -> dict:
    """Return the answer; it must be what the route's description says."""
    assert response.status_code == 200, response.text
    answer = BY_NAME[name].answer
    return answer.model_validate(response.json()).model_dump(mode="json")


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return ErrorAnswer.model_validate(response.json()).error.message


def policy(number: float) -> dict:
    return {"source": POLICY.format(number), "name": f"tried-{number}", "by": "alice"}


def serving(control: Controlled) -> set[str]:
    return {cell["arm_id"] for cell in control.client.get("/allocation").json()["cells"]}


def test_probes_tell_what_is_missing(control: Controlled):
    assert answered(control.client.get("/health"), "health") == {"status": "ok"}
    ready = control.client.get("/ready")
    assert ready.status_code == 503
    assert ready.json() == {"ready": False, "waiting_for": ["the picker"]}


def test_arms_and_allocation_are_told_as_described(control: Controlled):
    arms = answered(control.client.get("/arms"), "list_arms")["arms"]
    assert {"least-requests", "round-robin"} <= {arm["name"] for arm in arms}
    one = answered(control.client.get("/arms/least-requests"), "show_arm")
    assert one["history"][0]["state"] == "live"
    assert answered(control.client.get(f"/arms/{one['id'][:6]}"), "show_arm") == one
    allocation = answered(control.client.get("/allocation"), "allocation")
    assert sorted(s for cell in allocation["cells"] for s in cell["shards"]) == list(range(64))
    assert allocation["window"] == answered(control.client.get("/status"), "status")["window"]


def test_an_arm_is_added_and_brought_through_its_steps_with_who_and_why(control: Controlled):
    new = answered(control.post("/arms", policy(7.0) | {"why": "a hunch"}), "add_arm")
    assert (new["new"], new["state"], new["reason"]) == (
        True,
        "candidate",
        "added by alice: a hunch",
    )
    again = answered(control.post("/arms", policy(7.0)), "add_arm")
    assert (again["new"], again["id"]) == (False, new["id"])
    for step, state in (("promote", "canary"), ("promote", "live"), ("pin", "live")):
        said = {"by": "bob", "why": "it is good"}
        told = answered(control.post(f"/arms/{new['id']}/{step}", said), "change_arm")
        assert told["state"] == state
    assert "is pinned" in refused(control.post(f"/arms/{new['id']}/retire"), 409)
    assert "live already" in refused(control.post("/arms/tried-7.0/promote"), 409)
    control.post("/arms/tried-7.0/unpin")
    assert answered(control.post("/arms/tried-7.0/retire"), "change_arm")["state"] == "retired"
    shown = answered(control.client.get("/arms/tried-7.0"), "show_arm")
    assert [step["state"] for step in shown["history"]] == [
        "candidate", "canary", "live", "live", "live", "retired",
    ]  # fmt: skip
    assert shown["thought"] == "tried by hand"
    events = control.rows(
        "select message from events where kind = 'operator' and subject = 'tried-7.0' order by at_s"
    )
    assert ["live: promoted by bob: it is good"] in events
    assert ["pinned by bob: it is good"] in events


def test_an_arm_that_is_taken_out_loses_its_traffic_at_once(control: Controlled):
    allocation = control.client.get("/allocation").json()
    leading = max(allocation["cells"], key=lambda cell: cell["share"])["arm_id"]
    answered(control.post(f"/arms/{leading}/quarantine", {"by": "alice"}), "change_arm")
    try:
        # The window would last for ten minutes.
        wait_until(lambda: leading not in serving(control), 20)
    finally:
        control.post(f"/arms/{leading}/promote")
        control.post(f"/arms/{leading}/promote")


@pytest.mark.parametrize(
    ("source", "word"),
    [("import os\n", "line 1"), ("", "score"), ("def score(request, replica, fleet):\n    return 'x'\n", "line 2"),
     ("x" * 10_000, "8192 bytes"), ("d\u00e9f", "line 1")],
)  # fmt: skip
def test_a_policy_that_does_not_verify_is_refused_as_the_verifier_does(
    control: Controlled, source: str, word: str
):
    before = control.rows("select count(*) from arms")
    assert word in refused(control.post("/arms", {"source": source}), 422)
    assert control.rows("select count(*) from arms") == before


@pytest.mark.parametrize(
    ("method", "path", "status", "word"),
    [("GET", "/nothing", 404, "/openapi.json"), ("GET", "/arms/nobody", 404, "nobody"),
     ("POST", "/arms/nobody/pin", 404, "nobody"), ("POST", "/arms/least-requests/explode", 404, "nothing at"),
     ("DELETE", "/arms", 405, "GET, POST"), ("PUT", "/health", 405, "GET"), ("GET", "/sql", 405, "POST")],
)  # fmt: skip
def test_what_is_not_there_is_told_in_json(
    control: Controlled, method: str, path: str, status: int, word: str
):
    assert word in refused(control.client.request(method, path, headers=control.bearer()), status)


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [(b"{", 400, "The body"), (b"[]", 400, "object"), (b"{}", 400, "source"), (b'{"source": 3}', 400, "source"),
     (b'{"source": "", "colour": 1}', 400, "colour"), (b'{"source": "", "by": "a\\nb"}', 400, "by"),
     (b'{"source": "", "origin": "alien"}', 400, "origin"), (b'{"source": "", "created_at": NaN}', 400, "created_at"),
     (b"\xff\xfe", 400, "The body"), (b" " * 600_000, 413, "512 KiB")],
)  # fmt: skip
def test_a_wrong_body_is_named(control: Controlled, body: bytes, status: int, word: str):
    assert word in refused(
        control.client.post("/arms", content=body, headers=control.bearer()), status
    )


def cycle(candidates: int = 0) -> SynthesisRow:
    tried = [
        CandidateRow(f"{i:012d}", POLICY.format(i) + "#" * 2000, "rejected", "race", "why", -0.1, None, None, model="m",
                     tokens=7, cost_usd=0.5)
        for i in range(candidates)
    ]  # fmt: skip
    return SynthesisRow(
        1.8e9, 3, "operator: by hand", "genetic", 1.0, 1.0, 9, 0.1, candidates=tuple(tried)
    )


def test_a_cycle_by_hand_is_kept_with_all_its_candidates(control: Controlled):
    for number in range(2):
        body = {"cycle": asdict(cycle(500)), "by": "alice"}
        assert answered(control.post("/syntheses", body), "keep_cycle") == {"synthesis": number}
    told = control.rows("select synthesis, candidates, tokens from syntheses order by synthesis")
    assert told == [[0, 500, 9], [1, 500, 9]]
    kept = "select count(*), sum(tokens), sum(cost_usd), min(model) from candidates"
    assert control.rows(kept) == [[1000, 7000, 500.0, "m"]]
    events = control.rows("select message from events where subject = 'genetic'")
    assert any("synthesis 1 run by alice" in message for (message,) in events)
    assert 'outcome="nothing"} 2.0' in control.client.get("/metrics").text
    for wrong in ({}, {"cycle": {}}, {"cycle": asdict(cycle()) | {"seconds": "long"}}):
        assert "cycle" in refused(control.post("/syntheses", wrong), 400)


# --- orders ---------------------------------------------------------------------------------------


def test_orders_are_obeyed_at_once_and_outlive_the_process(tmp_path):
    with controlled(tmp_path, window_s=600.0) as running:
        order = {"arm": "round-robin", "by": "alice", "why": "an outage"}
        told = answered(running.post("/control/allocate", order), "obey")
        assert told["in_force"] == "everything to round-robin"
        only = answered(running.client.get("/arms/round-robin"), "show_arm")["id"]
        wait_until(lambda: serving(running) == {only}, 20)
        assert "everything to round-robin" in running.client.get("/allocation").json()["why"]
        assert running.client.get("/status").json()["guard_rails"] == "everything to round-robin"
        assert answered(running.post("/control/freeze", {"by": "bob"}), "obey")["frozen"]
        assert "stays as it is" in refused(running.post("/control/human-only"), 409)
        running.kill()
        running.start()
        wait_until(lambda: running.client.get("/allocation").status_code == 200, 20)
        assert serving(running) == {only}
        told = answered(running.client.get("/control"), "guard_rails")
        assert (told["in_force"], told["reason"]) == (
            "frozen, everything to round-robin", "frozen by bob",
        )  # fmt: skip
        # Nobody has sent a request: no allocation has shown that it is good.
        assert "no earlier allocation" in refused(running.post("/control/rollback"), 409)
        events = running.rows(
            "select subject, message from events where kind = 'operator' order by at_s"
        )
        assert events == [
            ["allocate", "everything to round-robin by alice: an outage"],
            ["freeze", "frozen by bob"],
        ]
        running.kill()
        code, out, _ = run("control", "release", "--json", "-", cwd=tmp_path)
        assert code == 3  # the data directory is held, but nobody answers
        running.start()
        code, out, _ = run(
            "control", "release", "--json", "-", "--why", "all is well", cwd=tmp_path
        )
        assert (code, json.loads(out)["in_force"]) == (0, "nothing: the loop decides")
        assert run("control", "show", cwd=tmp_path)[0] == 0


def test_every_change_of_allocation_is_in_the_events(tmp_path):
    with controlled(tmp_path, window_s=1.0) as running:
        for arm in ("round-robin", "random", "least-requests"):
            answered(running.post("/control/allocate", {"arm": arm}), "obey")
            named = answered(running.client.get(f"/arms/{arm}"), "show_arm")["id"]
            wait_until(lambda named=named: serving(running) == {named}, 20)
        wait_until(lambda: (running.rows("select max(window_id) from windows")[0][0] or 0) > 3, 30)
        allocations = running.rows(
            "select window_id, list((arm_id, replicas, shards) order by cell) from allocations "
            "where window_id <= (select max(window_id) from windows) group by 1 order by 1"
        )
        changed = [w for (_, before), (w, after) in pairwise(allocations) if before != after]
        told = {
            row[0] for row in running.rows("select window_id from events where kind = 'allocation'")
        }
        assert len(changed) >= 2
        assert {allocations[0][0], *changed} <= told


# --- who may call -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}]
)
@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.changes], ids=lambda route: route.name
)
def test_changes_need_the_token(control: Controlled, route: Route, given_header: dict[str, str]):
    path = route.path.format(arm="least-requests", step="pin", order="freeze", change="start")
    answer = control.client.post(path, json={}, headers=given_header)
    assert TOKEN_FILE in refused(answer, 401)
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert control.rows("select count(*) from arms where pinned") == [[0]]


def test_the_token_is_for_its_owner_only_and_in_no_other_file(control: Controlled):
    path = control.settings.data_dir / TOKEN_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_bytes()
    assert len(token) >= 24
    others = [p for p in control.folder.rglob("*") if p.is_file() and p != path]
    assert others
    assert not [p for p in others if token in p.read_bytes()]


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Host": "evil.example:8081"}, {"Host": "127.0.0.1.evil.example"}, {"Host": "["},
     {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "https://127.0.0.1"}],
)  # fmt: skip
def test_pages_from_elsewhere_may_not_even_read(control: Controlled, headers: dict[str, str]):
    for path in ("/status", "/arms"):
        refused(control.client.get(path, headers=headers), 403)
    refused(control.client.post("/sql", json={"query": "select 1"}, headers=headers), 403)
    refused(
        control.client.post("/arms/least-requests/pin", headers=headers | control.bearer()), 403
    )


def test_our_own_pages_may(control: Controlled):
    port = control.settings.control_port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert control.client.get("/status", headers=headers).status_code == 200


def test_beyond_loopback_every_call_needs_the_token_but_the_probes(tmp_path):
    token = "a-token-of-my-own"
    with controlled(tmp_path, control_host="0.0.0.0", control_token=token, window_s=60.0) as wide:
        assert wide.client.get("/health").status_code == 200
        assert wide.client.get("/ready").status_code == 503
        for path in ("/status", "/arms", "/openapi.json"):
            refused(wide.client.get(path), 401)
        refused(wide.client.post("/sql", json={"query": "select 1"}), 401)
        assert (
            wide.client.get("/arms", headers={"Authorization": f"Bearer {token}"}).status_code
            == 200
        )
        code, out, errors = run("arms", "list", "--json", "-", cwd=tmp_path)
        assert (code, errors) == (0, "")
        assert len(json.loads(out)) >= 4


def test_the_token_stays_from_one_start_to_the_next_unless_another_is_given(tmp_path):
    write_token(tmp_path, None)
    made = (tmp_path / TOKEN_FILE).read_text()
    write_token(tmp_path, None)
    assert (tmp_path / TOKEN_FILE).read_text() == made
    write_token(tmp_path, "mine-and-long-enough")
    assert (tmp_path / TOKEN_FILE).read_text() == "mine-and-long-enough"
    assert stat.S_IMODE((tmp_path / TOKEN_FILE).stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == [TOKEN_FILE]


def test_what_is_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org"))
    )


# --- the description --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(control: Controlled) -> dict:
    return control.client.get("/openapi.json").json()


def test_every_route_is_described_and_every_description_has_a_route(
    control: Controlled, document: dict
):
    described = {
        (method.upper(), path) for path, item in document["paths"].items() for method in item
    }
    for method, path in described:
        real = path.format(arm="x", step="pin", order="freeze", change="start", name="main.js")
        with control.client.stream(method, real, json={}) as answer:
            assert answer.status_code not in {404, 405} or "x" in real
            if answer.status_code == 200:
                media = document["paths"][path][method.lower()]["responses"]["200"]["content"]
                assert answer.headers["content-type"].split(";")[0] in media or "*/*" in media
    assert described == {(route.method.upper(), route.path) for route in ROUTES}
    changing = {route.path for route in ROUTES if route.changes}
    secured = {
        path
        for path, item in document["paths"].items()
        if any("security" in o for o in item.values())
    }
    assert secured == changing


def test_the_description_tells_of_every_route_that_is_served(tmp_path, document: dict):
    with Store.open(tmp_path / "telemetry.duckdb") as store:
        registry = Registry(store)
        status = Status(Settings(), registry)
        desk = SimpleNamespace(status=status.as_dict)
        app = control_app(store, desk, Access("127.0.0.1", "t"), Metrics(status, registry))
    served = {(route.method, route.resource.canonical) for route in app.router.routes()}
    assert served == {
        (method.upper(), path) for path, item in document["paths"].items() for method in item
    }


def test_references_and_names_of_the_description_resolve(document: dict):
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(schemas)
    assert "ErrorAnswer" in references
    names = [
        operation["operationId"]
        for item in document["paths"].values()
        for operation in item.values()
    ]
    assert len(names) == len(set(names))
    for path, item in document["paths"].items():
        for operation in item.values():
            told = {parameter["name"] for parameter in operation.get("parameters", ())}
            assert told == set(re.findall(r"{(\w+)}", path))


def test_the_examples_of_bodies_are_valid_and_that_of_a_policy_is_taken(control: Controlled):
    examples = {
        body: {
            name: field.examples[0] for name, field in body.model_fields.items() if field.examples
        }
        for body in {route.body for route in ROUTES if route.body}
    }
    for body, example in examples.items():
        assert example
        body.model_validate_json(json.dumps(example))
    answered(control.post("/arms", examples[NewArmBody]), "add_arm")


# --- nonsense ---------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
known_keys = st.sampled_from(sorted({*NewArmBody.model_fields, "query", "max_rows"}))
bodies = st.one_of(
    st.binary(max_size=200),
    st.dictionaries(known_keys, json_values, max_size=5).map(
        lambda value: json.dumps(value).encode()
    ),
    json_values.map(lambda value: json.dumps(value).encode()),
)
words = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12)
quiet = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quiet
@given(route=st.sampled_from([r for r in ROUTES if r.name != "live"]), body=bodies, word=words)
def test_nonsense_is_refused_in_json_and_never_breaks_anything(
    control, route: Route, body: bytes, word: str
):
    word = quote(word, safe="")
    path = route.path.format(arm=word, step="pin", order="freeze", change="start", name=word)
    content = body if route.method == "post" else None
    request = control.client.build_request(
        route.method.upper(), path, content=content, headers=control.bearer()
    )
    answer = control.client.send(request)
    assert answer.status_code < 500 or route.name == "ready", answer.text
    if answer.status_code >= 400 and route.name != "ready":
        refused(answer, answer.status_code)


def test_nothing_of_all_this_left_a_traceback(control: Controlled):
    assert "Traceback" not in control.log()
