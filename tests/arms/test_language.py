"""What the language refuses, how it says so, and what it makes of what it accepts."""

import hashlib
import inspect
import random
import re
import sys
import time
import warnings

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from autopoiesis.arms.language import PolicyError, thought_of, verify
from autopoiesis.arms.lexis import MAX_BYTES
from autopoiesis.arms.seeds import seed_arms

HEAD = "def score(request, replica, fleet):\n"


def score(*lines):
    return HEAD + "".join(f"    {line}\n" for line in lines)


def refusal(source):
    with pytest.raises(PolicyError) as caught:
        verify(source)
    return str(caught.value)


def test_canonical_form():
    source = '''"""Thought."""
def admit(request, fleet): return 1  # always

def score ( request , replica , fleet ):
  """Least load."""
  x = 1_000
  x += (replica.in_flight*2)
  if not (x > 3 and (x < 9)) : return -(-x)
  else:
     if x==4: y = ((.5))
     else: y = +x
  return (y if x<y<=2 else (x if x != 0 else 0x and 1))
'''.replace("0x and 1", "7")
    policy = verify(source)
    assert policy.source == (
        "def score(request, replica, fleet):\n"
        "    x = 1000.0\n"
        "    x = x + replica.in_flight * 2.0\n"
        "    if not (x > 3.0 and x < 9.0):\n"
        "        return x\n"
        "    elif x == 4.0:\n"
        "        y = 0.5\n"
        "    else:\n"
        "        y = x\n"
        "    return y if x < y <= 2.0 else x if x != 0.0 else 7.0\n"
        "\n"
        "def admit(request, fleet):\n"
        "    return 1.0\n"
    )
    assert policy.id == hashlib.sha256(policy.source.encode()).hexdigest()[:12]
    assert policy.functions == {"score", "admit"}
    assert verify(source.encode()) == policy
    assert verify(source.replace("\n", "\r\n")) == policy


@pytest.mark.parametrize(
    ("expression", "canonical"),
    [
        ("-2 ** 2", "-2.0 ** 2.0"),
        ("(-2) ** 2", "(-2.0) ** 2.0"),
        ("2 ** -1 ** 2", "2.0 ** -1.0 ** 2.0"),
        ("(2 ** 3) ** 4", "(2.0 ** 3.0) ** 4.0"),
        ("2 ** (3 ** 4)", "2.0 ** 3.0 ** 4.0"),
        ("1 - (2 - 3)", "1.0 - (2.0 - 3.0)"),
        ("(1 - 2) - 3", "1.0 - 2.0 - 3.0"),
        ("1 / (2 * 3)", "1.0 / (2.0 * 3.0)"),
        ("-(1 + 2) * 3", "-(1.0 + 2.0) * 3.0"),
        ("-(1 * 2)", "-(1.0 * 2.0)"),
        ("1 - -+-(2 + 3)", "1.0 - (2.0 + 3.0)"),
        ("- - -1", "-1.0"),
        ("(1 if 2 < 3 else 4) + 5", "(1.0 if 2.0 < 3.0 else 4.0) + 5.0"),
        ("(1 if 2<3 else 4) if 5<6 else 7", "(1.0 if 2.0 < 3.0 else 4.0) if 5.0 < 6.0 else 7.0"),
        (
            "1 if 2<3 or 4<5 and not 6<7 else 8",
            "1.0 if 2.0 < 3.0 or 4.0 < 5.0 and not 6.0 < 7.0 else 8.0",
        ),
        (
            "1 if (2<3 or 4<5) and 6<7 else 8",
            "1.0 if (2.0 < 3.0 or 4.0 < 5.0) and 6.0 < 7.0 else 8.0",
        ),
        (
            "1 if (2<3 and 4<5) and 6<7 else 8",
            "1.0 if 2.0 < 3.0 and 4.0 < 5.0 and 6.0 < 7.0 else 8.0",
        ),
        ("1 if not (not 2<3) else 8", "1.0 if not not 2.0 < 3.0 else 8.0"),
        (
            "1e22 + 1E-7 + .5 + 5. + 123456789012345678",
            "1e+22 + 1e-07 + 0.5 + 5.0 + 1.2345678901234568e+17",
        ),
    ],
)
def test_canonical_expressions(expression, canonical):
    policy = verify(score(f"return {expression}"))
    assert policy.source == score(f"return {canonical}")
    assert verify(policy.source) == policy


# Source and what its refusal must say: the line, the fault, what to write instead.
REFUSED = [
    ("", "line 1: `score` is missing; add def score"),
    ("x = 1\n" + score("return 1"), "line 1: only function definitions"),
    ("import os\n" + score("return 1"), "line 1: .*no imports"),
    ("from math import sqrt\n" + score("return 1"), "line 1: .*no imports"),
    (score("return 1") + score("return 2"), "line 3: `score` is defined twice"),
    (score("return 1") + "def helper(x):\n    return x\n", "line 3: .*define only score, admit"),
    (
        "def score(replica, request, fleet):\n    return 1",
        "write def score\\(request, replica, fleet\\)",
    ),
    ("def score(request, replica, fleet=1):\n    return 1", "defaults has no place"),
    ("def score(request, replica, fleet, /):\n    return 1", "posonlyargs has no place"),
    ("def score(request, replica, *, fleet):\n    return 1", "kwonlyargs has no place"),
    ("def score(request, replica, *fleet):\n    return 1", "vararg has no place"),
    ("def score(request, replica, fleet, **k):\n    return 1", "kwarg has no place"),
    ("def score(request: float, replica, fleet):\n    return 1", "annotation has no place"),
    ("def score(request, replica, fleet) -> float:\n    return 1", "`->` .*annotations"),
    ("@cache\n" + score("return 1"), "line 1: `@` .*decorators"),
    ("async " + score("return 1"), "AsyncFunctionDef|plain def"),
    (score('"""Doc."""'), "does nothing; return a number"),
    (score("return"), "line 2: return needs a number"),
    (score("x = 1"), "line 2: a path through `score` ends without return"),
    (score("if fleet.held > 1:", "    return 1"), "ends without return"),
    (score("return 1", "return 2"), "line 3: never reached"),
    (
        score("if fleet.held > 1:", "    x = 1", "return x"),
        "line 4: `x` is not assigned on every path",
    ),
    (score("x += 1", "return x"), "line 2: `x` is not assigned"),
    (score("x = x", "return x"), "line 2: `x` is not assigned"),
    (score("return y"), "`y` is not assigned"),
    (score("replica = 1", "return 1"), "`replica` is taken"),
    (score("score = 1", "return score"), "`score` is taken; choose another name"),
    (score("min = 1", "return 1"), "`min` is taken"),
    (score("sum = 1", "return 1"), "`sum` is taken"),
    (score("_x = 1", "return 1"), "underscore"),
    (score("x = y = 1", "return x"), "one name per assignment"),
    (score("x, y = 1, 2", "return x"), "only a local name can be assigned"),
    (score("replica.in_flight = 1", "return 1"), "only a local name can be assigned"),
    (score("x: float = 1", "return x"), "line 2: .*leave the annotation out"),
    (score("for i in fleet:", "    x = 1", "return 1"), "no loops"),
    (score("while fleet.held > 0:", "    x = 1", "return 1"), "no loops"),
    (score("pass", "return 1"), "leave it out"),
    (score("fleet.held", "return 1"), "a value that nobody uses"),
    (score("try:", "    x = 1", "except:", "    x = 2", "return 1"), "nothing can fail"),
    (score("def score(request, replica, fleet):", "    return 1", "return 1"), "at the top level"),
    (score("global x", "return 1"), "keep no state"),
    (score("assert fleet.held > 1", "return 1"), "write an if"),
    (score("raise fleet", "return 1"), "return a number instead"),
    (score("del fleet", "return 1"), "names need no deleting"),
    (score("return fleet.held > 1"), "a comparison is no number: write 1.0 if"),
    (score("x = fleet.held > 1", "return 1"), "a comparison is no number"),
    (score("return (fleet.held > 1) + 1"), "a comparison is no number"),
    (score("return fleet.held and 1"), "stand only in conditions"),
    (score("return not fleet.held"), "stands only in conditions"),
    (
        score("return 1 if fleet.held else 2"),
        "a condition compares numbers; write for example x > 0.0",
    ),
    (score("if replica.draining:", "    return 1", "return 2"), "a condition compares numbers"),
    (score("return 1 if not fleet.held else 2"), "a condition compares numbers"),
    (score("return 1 if fleet.held > 1 and 2 else 2"), "a condition compares numbers"),
    (score("return 1 if (fleet.held > 1) == (fleet.held > 2) else 2"), "a comparison is no number"),
    (score("return 1 if fleet.held is 1 else 2"), "only numbers are compared"),
    (score("return 1 if fleet.held in replica else 2"), "no number|only numbers are compared"),
    (score("return True"), "True is no number"),
    (score("return None"), "None is no number"),
    (score("return ..."), r"`\.\.\.` is not part"),
    (score("return 'a'"), "'a' is no number"),
    (score("return 1j"), "touches the number"),
    (score("return 0x10"), "touches the number"),
    (score("return 1if fleet.held > 1 else 2"), "touches the number"),
    (score("return f'{1}'"), "is not part of the language"),
    (score("return b'a'"), "is not part of the language"),
    (score('return x"""a\nb"""'), '`"""a` is not part of the language'),
    (score("return 1e999"), "too large; write one below 1e308"),
    (score(f"return {'9' * 400}"), "too large"),
    (score(f"return {'9' * 5000}"), "not valid Python|too large"),
    (score("return 007"), "line 2: not valid Python"),
    (score("return request"), "`request` is no number; read a field, such as request.input_tokens"),
    (score("return min"), "`min` is a function; call it"),
    (score("return request.input_token"), "did you mean request.input_tokens"),
    (score("return fleet.zzz"), "its fields: replicas, in_flight"),
    (score("return request.__class__"), "no field `__class__`"),
    (score("return request.input_tokens.real"), "sees only request, replica, fleet"),
    (score("x = 1", "return x.real"), "sees only"),
    (score("return 1.0.real"), "touches|sees only|not valid|part of"),
    (
        score("return 1") + "def admit(request, fleet):\n    return replica.in_flight",
        "`admit` sees only request, fleet",
    ),
    (score("return print(1)"), "only these can be called: min, max"),
    (score("return request.input_tokens()"), "only these can be called"),
    (score("return min(1)"), "min takes 2 to 16 arguments, not 1"),
    (score("return clip(1, 2)"), "clip takes 3 arguments, not 2"),
    (score("return abs(x=1)"), "keywords has no place"),
    (score("return abs(*fleet)"), "write the arguments out"),
    (score("return max(fleet.held for x in fleet)"), "takes 2|no loops"),
    (score("return 7 // 2"), "`//` .*write floor"),
    (score("x = 7", "x //= 2", "return x"), "line 3: `//=` .*write x = floor"),
    (score("return 1 << 2"), "`<<` is not part"),
    (score("return 1 @ 2"), "`@` is not part"),
    (score("return 1 | 2"), "write `or`"),
    (score("return ~1"), "write `not`"),
    (score("return (x := 1)"), "a line of its own"),
    (score("return [1][0]"), r"`\[` .*no lists"),
    (score("return {1: 2}"), "no dictionaries"),
    (score("return 1, 2"), "one number; leave the comma out"),
    (score("return lambda: 1"), "no functions of your own"),
    (score("return (yield 1)"), "return one number"),
    (score("return await 1"), "leave it out|not valid"),
    (score("return 1;"), "`;` .*a line of its own"),
    (score("return 1 + \\", "    2"), "parentheses"),
    (score("return 'open"), "closed quotes"),
    (score("return (1"), "line 2: not valid Python"),
    (score("return 1)"), "a bracket closes that was never opened"),
    (score("return 1 +"), "line 2: not valid Python"),
    (HEAD + "return 1", "line 2: not valid Python"),
    (score("return 1", "    return 2"), "line 3: not valid Python"),
    (score("return 1  # caf\u00e9"), r"line 2: character '\\xe9' is not plain ASCII"),
    (score("return \u0661"), "not plain ASCII"),
    (score("r\u0435turn 1"), "not plain ASCII"),
    (score("return 1\x00"), "not plain ASCII"),
    (score("return 1\x0c"), "not plain ASCII"),
    ("\ud800", "not plain ASCII"),
    (b"\xff\xfe", "not plain ASCII"),
    (17, "source text, not int"),
    (None, "source text, not NoneType"),
]


@pytest.mark.parametrize(("source", "says"), REFUSED)
def test_refused_with_a_sentence(source, says):
    message = refusal(source)
    assert re.search(says, message), message
    assert len(message) < 400
    assert "\n" not in message
    if isinstance(source, str):
        assert message.startswith("line "), message


# Programs that hang, exhaust or climb out of Python; here they must be refused at once.
N = MAX_BYTES
BOMBS = {
    "too long": score("return 1") + "#" * N,
    "minuses": score("return " + "-" * 8000 + "1"),
    "pluses and minuses": score("return " + "+ -" * 2000 + "1"),
    "nots": score("return 1 if " + "not " * 1900 + "2 < 3 else 4"),
    "brackets": score("return " + "(" * 3900 + "1" + ")" * 3900),
    "open brackets": score("return " + "(" * 8000),
    "square brackets": score("return " + "[" * 8000),
    "calls": score("return " + "abs(" * 1500 + "1" + ")" * 1500),
    "sum": score("return " + "1+" * 3900 + "1"),
    "power tower": score("return " + "9**" * 2600 + "9"),
    "conditionals": score("return " + "1 if 2<3 else " * 550 + "1"),
    "comparison chain": score("return 1 if " + "1<" * 3900 + "2 else 3"),
    "ands": score("return 1 if " + "1<2 and " * 900 + "1<2 else 3"),
    "attributes": score("return request" + ".a" * 3900),
    "min arguments": score("return min(" + "1," * 3900 + "1)"),
    "elifs": score("if 1<2:", " x=1", *["elif 1<2:", " x=1"] * 350, "return 1"),
    "short elifs": score("if 1<2:", " x=1", *["elif 1<2:", " x=1"] * 120, "return 1"),
    "nested ifs": HEAD
    + "".join(" " * (i + 1) + "if 1<2:\n" for i in range(110))
    + " " * 111
    + "x=1\n",
    "indentation": HEAD + " " * 4000 + "return 1\n",
    "lines": score(*["x=1"] * 800, "return 1"),
    "blank lines": HEAD + "\n" * 8000,
    "statements": "\n".join([HEAD, *[" x=1"] * 290, " return 1"]).replace("x=1", "x=1+1+1+1+1"),
    "quotes": score("return " + '"' * 7999),
    "triple quotes": '"""' * 2700,
    "one triple quote": score("return 1") + "'''" + '"""\'' * 1900,
    "colons": ":" * 8000,
    "dots": "." * 8000,
    "digits": score("return " + "1" * 8000),
    "underscored digits": score("return " + "1_" * 3900),
    "big power": score("return 9 ** 9 ** 9 ** 9"),
    "squaring": score("x = 9", *["x = x * x"] * 36, "return x"),
    "subclasses": score("return ().__class__.__bases__[0].__subclasses__()"),
    "frame climb": score("return (lambda: (yield))().gi_frame.f_back.f_globals"),
    "traceback": score(
        "try:", "    1/0", "except E as e:", "    return e.__traceback__.tb_frame", "return 1"
    ),
    "globals": score("return admit.__globals__"),
    "format": score("return '{0.__class__}'.format(request)"),
    "attribute error": score("return request.x.obj"),
    "import call": score("return __import__('os').system('true')"),
    "eval": score("return eval('1')"),
    "open": score("return open('/etc/passwd')"),
    "input objects": score("request.input_tokens = 1.0", "return 1"),
    "hidden state": score("score.count = 1", "return 1"),
    "default state": "def score(request, replica, fleet, seen=[]):\n    return 1",
    "memory": score("return [0] * 10 ** 10"),
    "text memory": score("return 'a' * 10 ** 10"),
    "range": score("return sum(range(10**10))"),
    "exit": score("raise SystemExit"),
    "recursion": score("return score(request, replica, fleet)"),
    "shift": score("return 1 << 10 ** 10"),
    "booleans": score("x = (replica.in_flight > 0.0) + (replica.in_flight > 0.0)", "return x"),
    "decorator": "@print\n" + score("return 1"),
    "class": "class score:\n    pass",
    "match": score("match fleet:", "    case 1:", "        return 1", "return 1"),
    "star expression": score("return *fleet,"),
    "walrus": score("return (x := 1)"),
    "type parameter": "def score[T](request, replica, fleet):\n    return 1",
    "type alias": "type score = int\n" + score("return 1"),
    "encoding cookie": b"# -*- coding: utf-7 -*-\n+AGYAbwBy-",
    "utf-16": score("return 1").encode("utf-16"),
    "name homoglyph": score("return m\u0131n(1, 2)"),
}
HARMLESS = {"big power", "squaring"}


@pytest.mark.parametrize("name", BOMBS)
def test_attacks_are_refused_or_harmless_and_cheap(name):
    started = time.process_time()
    if name in HARMLESS:
        assert "9.0" in verify(BOMBS[name]).source
    else:
        assert refusal(BOMBS[name])
    assert time.process_time() - started < 0.25


def test_canonical_form_that_outgrows_the_bounds_is_refused():
    lines = ["if 1<2:"] + [" x=1"] * 100
    nested = HEAD + "".join(" " * (i + 1) + "if 1<2:\n" for i in range(15))
    source = nested + (" " * 16 + "x=1\n") * 130 + " return 1\n"
    assert len(source) < MAX_BYTES
    assert "canonical form" in refusal(source)
    assert verify(score(*lines, "return 1"))


def test_nesting_bounds_keep_room_for_real_policies():
    assert verify(score("return " + " + ".join(["fleet.held"] * 50)))
    assert verify(
        score("if 1<2:", " x=1", *["elif 1<2:", " x=1"] * 40, "else:", " x=1", "return x")
    )
    assert verify(score("return " + "(1 + " * 20 + "1" + ")" * 20))


def test_verify_works_close_to_the_recursion_limit():
    source = score("return " + "(1 + " * 20 + "1" + ")" * 20)

    def deep(n):
        if n:
            return deep(n - 1)
        try:
            return verify(source)
        except PolicyError:
            return None

    outcomes = set()
    for frames in range(20, 400, 4):
        here = len(inspect.stack(0))
        outcomes.add(deep(sys.getrecursionlimit() - here - frames) is not None)
    assert outcomes == {True, False}


def test_thought_of():
    assert thought_of("# One.\n#  Two.\n\n" + score("return 1")) == "One.\nTwo."
    assert (
        thought_of('"""Said here.\n\nMore."""\n' + score("# no", "return 1"))
        == "Said here.\n\nMore."
    )
    assert thought_of(score("# no", "return 1")) == ""
    assert thought_of("") == thought_of("\x00\ud800'''") == ""


# --- fuzzing ----------------------------------------------------------------------------------------

SOURCES = [arm.source for arm in seed_arms()]
PIECES = [
    *"()[]{}:,.;=+-*/%<>!~@&|^\\'\"#\n\t 0123456789e_xj\x00\x0c\u00e9",
    "    ", "**", "//", "->", ":=", "==", "not ", " and ", " or ", " if ", " else ", "elif ", "else:\n",
    "return ", "def ", "lambda ", "for ", "in ", "is ", "import os", "yield ", "await ", "async ", "pass\n",
    "None", "True", "1e999", "request", "replica.in_flight", ".held", "min(", "clip(", "x", "_", "'''", '"""',
]  # fmt: skip


def verify_quickly(source):
    """Verify, and let nothing through but a policy or a PolicyError in reasonable time."""
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        policy, refused = None, ""
        try:
            policy = verify(source)
        except PolicyError as error:
            refused = str(error)
    assert time.process_time() - started < 0.25
    assert "\n" not in refused
    if policy:
        assert verify(policy.source) == policy
    return policy


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300)))
def test_any_bytes_and_text(source):
    assert verify_quickly(source) is None


@settings(max_examples=400, deadline=None, derandomize=True)
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
    verify_quickly(score("x = 1", "return " + "".join(pieces)))


def test_no_text_that_passes_the_tokens_warns():
    # Python's tokenizer and parser warn about oddities such as 1if or "\d": none gets that far.
    for text in ("0in x", "1or 2", "1if 2<3 else 4", "'\\d'", "1 is 1", "0x1for x in y", "1_000_"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            refusal(score(f"return {text}"))
        assert not caught
