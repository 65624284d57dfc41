"""Draw the terminal view of a running demo as SVG.

python docs/demo_picture.py http://127.0.0.1:8081 > docs/demo.svg
"""

import io
import json
import sys
import urllib.request

from rich.console import Console

from autopoiesis.orchestrator.live_view import render

with urllib.request.urlopen(f"{sys.argv[1]}/status", timeout=5) as answer:  # noqa: S310
    status = json.load(answer)
console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
title = "autopoiesis demo   http://127.0.0.1:8080/v1   4 simulated replicas"
console.print(render(status, title))
sys.stdout.write(console.export_svg(title="autopoiesis demo"))
