"""Rooms import downwards only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "autopoiesis"
ROOMS = (
    "arms",
    "telemetry",
    "twin",
    "replicas",
    "gateway",
    "synthesis",
    "orchestrator",
    "evaluation",
)
"""From the lowest to the highest."""


def rooms_imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "autopoiesis" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_nothing_from_above(room):
    above = {*ROOMS[ROOMS.index(room) + 1 :], "cli"}
    found = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in (PACKAGE / room).rglob("*.py")
        for name in rooms_imported(path)
        if name in above or name.startswith("cli_")
    }
    assert found == set()
