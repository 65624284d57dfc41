"""What the first fence refuses of slow policies, how it says so, and what it makes of what it accepts."""

import ast
import random
import re
import time
import warnings

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from slow_scenes import SEEDS

from autopoiesis.arms.arm import arm_id
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.arms.slow import MAX_SLOW_BYTES, verify_slow

REST = "def should_reschedule(window, fleet, plan):\n    return False\n"


def slow(*lines):
    return (
        REST + "def schedule(window, fleet, plan):\n" + "".join(f"    {line}\n" for line in lines)
    )


GOOD = slow("return plan")


def test_the_normal_form_has_no_comments_no_blank_lines_and_keeps_strings():
    source = (
        "# Thought.\n"
        "import math   # used\n"
        "\n"
        "TEXT = '''a # no comment  \n"
        "\n"
        "# nor this   \n"
        "b'''   # but this\n"
        "\n"
        "def should_reschedule(window, fleet, plan):   \n"
        "    # nothing\n"
        "    total = 1 + \\\n"
        "        2  # three\n"
        "\n"
        "    return f'# {total}' == TEXT  \n"
        "def schedule(window, fleet, plan): return plan"
    )
    policy = verify_slow(source)
    assert policy.source == (
        "import math\n"
        "TEXT = '''a # no comment  \n"
        "\n"
        "# nor this   \n"
        "b'''\n"
        "def should_reschedule(window, fleet, plan):\n"
        "    total = 1 + \\\n"
        "        2\n"
        "    return f'# {total}' == TEXT\n"
        "def schedule(window, fleet, plan): return plan\n"
    )
    assert policy.modules == ("math",)
    assert verify_slow(policy.source) == policy
    assert verify_slow(source.encode()) == policy
    assert ast.dump(ast.parse(source)) == ast.dump(ast.parse(policy.source))


def test_the_id_is_that_of_the_normal_form():
    assert verify_slow(GOOD).id == verify_slow("# more\n" + GOOD + "\n\n# words\n").id
    assert verify_slow(GOOD.replace("\n", "\r\n")).id == verify_slow(GOOD).id
    assert verify_slow(GOOD.replace("False", "True")).id != verify_slow(GOOD).id


def test_the_id_of_an_arm_is_composed_of_its_policies():
    fast, slow_id = verify("def score(request, replica, fleet): return 1").id, verify_slow(GOOD).id
    assert arm_id(fast) == fast
    assert len({fast, slow_id, arm_id(fast, slow_id), arm_id(slow_id, fast)}) == 4
    assert len(arm_id(fast, slow_id)) == 12


def test_what_ordinary_policies_need_is_let_through():
    source = (
        '"""Doc."""\n'
        "from __future__ import annotations\n"
        "import numpy as np, math\n"
        "import scipy.optimize as opt\n"
        "from scipy import sparse\n"
        "from scipy.optimize import milp, Bounds\n"
        "from collections import Counter\n"
        "from dataclasses import dataclass, replace\n"
        "LIMIT: int = 3\n"
        "A, B = 1, 2\n"
        "@dataclass\n"
        "class Cost:\n"
        "    money: float = 0.0\n"
        "    def __post_init__(self):\n"
        "        self.money += 1\n"
        "    def __lt__(self, other):\n"
        "        return self.money < other.money\n"
        + slow(
            "try:",
            "    total = sum(g.replicas for g in plan.groups if g.replicas > 0)",
            "except ValueError as error:",
            "    raise",
            "while total > 0:",
            "    total -= 1",
            "best = max(fleet.options, key=lambda option: option.capacity_rps, default=None)",
            "return Plan([replace(g, replicas=2) for g in plan.groups])",
        )
    )
    assert verify_slow(source).modules == (
        "collections", "dataclasses", "math", "numpy", "scipy.optimize", "scipy.sparse",
    )  # fmt: skip


REFUSED = [
    ("", "line 1: `should_reschedule` is missing; add def should_reschedule\\(window"),
    (REST, "line 1: `schedule` is missing; add def schedule\\(window"),
    (GOOD + REST, "line 5: `should_reschedule` is defined twice; keep one"),
    (GOOD.replace("schedule(window, fleet, plan)", "schedule(window, plan)"), "the parameters differ; write def"),
    (GOOD.replace("fleet, plan)", "fleet, plan, *more)"), "the parameters differ"),
    (GOOD.replace("fleet, plan)", "fleet, plan, **more)"), "the parameters differ"),
    ("import functools\n@functools.cache\n" + GOOD, "leave the decorators of `should_reschedule` out"),
    ("async " + GOOD, "line 1: `AsyncFunctionDef`: write a plain def"),
    ("import os\n" + GOOD, "line 1: `os` cannot be imported, only bisect, collections"),
    ("import numpy.ctypeslib\n" + GOOD, "`numpy.ctypeslib` cannot be imported"),
    ("import scipy\n" + GOOD, "`scipy` cannot be imported"),
    ("from os import path\n" + GOOD, "`os` cannot be imported"),
    ("from math import *\n" + GOOD, "name what you import from math"),
    ("from . import x\n" + GOOD, "nothing to import from beside it"),
    ("from autopoiesis.arms.plan import Plan\n" + GOOD, "Plan and ReplicaGroup are there already"),
    (slow("import socket", "return plan"), "line 4: `socket` cannot be imported"),
    ("print(1)\n" + GOOD, "line 1: only imports, constants, functions and classes"),
    ("for i in range(3): pass\n" + GOOD, "line 1: only imports, constants"),
    ("x = 1\nx += 1\n" + GOOD, "line 2: only imports, constants"),
    (slow("global x", "x = 1", "return plan"), "line 4: `Global`: it keeps no state"),
    (slow("return open('/etc/passwd')"), "line 4: `open` is closed to policies"),
    (slow("return eval('1')"), "`eval` is closed"),
    (slow("f = exec", "return plan"), "`exec` is closed"),
    (slow("return __import__('os')"), "`__import__` is closed"),
    (slow("return getattr(plan, 'x')"), "`getattr` is closed"),
    (slow("return plan.__class__"), "attribute `__class__` is closed"),
    (slow("return (x for x in ()).gi_frame"), "attribute `gi_frame` is closed"),
    (slow("return __builtins__"), "`__builtins__` is closed"),
    (slow("match plan:", "    case object(__class__=c): return c"), "attribute `__class__` is closed"),
    (slow("def open(): return 1", "return plan"), "`open` is closed"),
    (slow("return (lambda eval: eval)(1)"), "`eval` is closed"),
    ("from math import __loader__\n" + GOOD, "`__loader__` is closed"),
    ("import math as __builtins__\n" + GOOD, "`__builtins__` is closed"),
    (slow("return ("), "line 4: not valid Python"),
    (slow("return 1", "    return 2"), "line 5: not valid Python"),
    (GOOD + "\x00", "not plain ASCII"),
    ("# caf\u00e9\n" + GOOD, "not plain ASCII"),
    ("#" * (MAX_SLOW_BYTES + 1), "over 24576 bytes"),
    ("\n" * 900 + GOOD, "over 800 lines"),
    (slow("return " + "-" * 20000 + "1"), "nested too deeply"),
    (slow("return " + "1+" * 10000 + "1"), "nested too deeply|operations"),
    (slow("return " + "1<" * 10000 + "1"), "over 10000 operations"),
    (slow("return " + "(" * 300), "not valid Python"),
    (None, "source text, not NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "says"), REFUSED)
def test_refused_with_a_sentence(source, says):
    started = time.process_time()
    with pytest.raises(PolicyError) as caught:
        verify_slow(source)
    assert time.process_time() - started < 1.0
    message = str(caught.value)
    assert re.search(says, message), message
    assert "\n" not in message
    assert len(message) < 400


# --- fuzzing ----------------------------------------------------------------------------------------

SOURCES = [seed.policy.source for seed in SEEDS.values()]
PIECES = [
    *"()[]{}:,.;=+-*/%<>!~@&|^\\'\"#\n\t 0123456789e_xj\x00\x0c", "    ", "**", "//", "->", ":=", "not ", " and ",
    " if ", " else ", "elif ", "else:\n", "return ", "def ", "lambda ", "for ", "in ", "is ", "import os", "yield ",
    "await ", "async ", "pass\n", "None", "'''", '"""', "f'{", "}'", "match x:\n", "case ", "class ", "try:\n",
    "except* ", "with ", "\\\n", "b'", "rb'", "nonlocal ", "global ", "from x import ", "__", "exec", "{**", "*a, ",
]  # fmt: skip


def verify_quickly(source):
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            policy = verify_slow(source)
        except PolicyError:
            policy = None
        assert time.process_time() - started < 1.0
        if policy:
            assert verify_slow(policy.source) == policy


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300)))
def test_any_bytes_and_text(source):
    verify_quickly(source)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 48))
def test_mutated_policies(seed):
    rng = random.Random(seed)
    text = rng.choice(SOURCES)
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(text) + 1), rng.choice([0, 0, 1, 2, 5, 40])
        other = rng.choice(SOURCES)
        start = rng.randrange(len(other))
        insert = rng.choice([rng.choice(PIECES), "", other[start : start + rng.randint(1, 60)]])
        text = text[:at] + insert * rng.choice([1, 1, 1, 2, 50]) + text[at + length :]
    verify_quickly(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60))
def test_sentences_of_pieces(pieces):
    verify_quickly(slow("x = 1", "return " + "".join(pieces)))
