"""The reference of slow functions as text: for people in the docs, for models in prompts."""

import inspect
from functools import cache

from autopoiesis.arms.card import meanings_of, table_of
from autopoiesis.arms.plan import Plan, ReplicaGroup
from autopoiesis.arms.seeds import slow_seed_text
from autopoiesis.arms.slow import MAX_SLOW_BYTES, MAX_SLOW_LINES, MODULES
from autopoiesis.arms.slow_features import (
    DemandFeatures,
    FleetFeatures,
    GpuFeatures,
    ModelFeatures,
    NodeFeatures,
    OptionFeatures,
    WindowFeatures,
)

_TEXT = """\
## Slow functions

A slow policy decides when the fleet is rescheduled and into what plan. It is ordinary Python, at most
{bytes} bytes and {lines} lines, with two functions:

* `should_reschedule(window, fleet, plan)`: Asked after each window; True or False. It should cost
  little: it is asked again and again.
* `schedule(window, fleet, plan)`: Asked when the other said True; returns the next `Plan`. While it
  thinks the fleet serves under the old plan, and what it returns costs time to carry out.

Imports: {modules}. `Plan` and `ReplicaGroup` are there without one. At the top level stand
imports, constants, functions and classes of your own. Closed are names and attributes that begin with
two underscores, and {closed} and their like. Keep nothing from one call to the next: the
process may be replaced at any time. Files, network, processes and threads are out of reach; what is
printed goes nowhere. An error, a wrong answer or an answer too late keeps the current plan and counts
as a fault.

A plan that cannot be carried out is not: more GPUs of a type than are available, a model below its
minimum, shares that do not sum to 1, a way to run a model that is not in `fleet.options`.

### The window

{window}

Each of `window.demand`:

{demand}

### The fleet

{fleet}

{methods}

Each of `fleet.gpus`:

{gpus}

Each of `fleet.nodes`:

{nodes}

Each of `fleet.models`:

{models}

Each of `fleet.options`, and `option.start_s`, the sum of load, engine and warm-up:

{options}

### The plan

`Plan(groups)`: at a cold start `plan.groups` is empty. {plan_methods}

`ReplicaGroup(model, gpu, tensor_parallel, replicas, ...)`, fields in this order:

{group}

### Example

```python
{example}```
"""


@cache
def slow_card() -> str:
    """Return the reference of slow functions: what they may do, fields, and an example."""
    return _TEXT.format(
        bytes=MAX_SLOW_BYTES,
        lines=MAX_SLOW_LINES,
        modules=", ".join(f"`{module}`" for module in MODULES),
        closed="`getattr`, `open`, `eval`, `exec`, `globals`",
        window=table_of("window.", meanings_of(WindowFeatures)),
        demand=table_of("", meanings_of(DemandFeatures)),
        fleet=table_of("fleet.", meanings_of(FleetFeatures)),
        methods="\n".join(
            f"* `fleet.{_call(FleetFeatures, name)}`: {_summary(FleetFeatures, name)}"
            for name in ("gpu", "model", "option", "capacity_rps", "migration_s")
        ),
        gpus=table_of("", meanings_of(GpuFeatures)),
        nodes=table_of("", meanings_of(NodeFeatures)),
        models=table_of("", meanings_of(ModelFeatures)),
        options=table_of("", meanings_of(OptionFeatures)),
        plan_methods=" ".join(
            f"`plan.{_call(Plan, name)}`: {_summary(Plan, name)}" for name in ("gpus", "replicas")
        ),
        group=table_of("", meanings_of(ReplicaGroup)),
        example=slow_seed_text("periodic", "greedy"),
    )


def _call(declared: type, method: str) -> str:
    _, *parameters = inspect.signature(getattr(declared, method)).parameters
    return f"{method}({', '.join(parameters)})"


def _summary(declared: type, method: str) -> str:
    return " ".join(inspect.cleandoc(getattr(declared, method).__doc__ or "").split())
