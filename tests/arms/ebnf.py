"""A reader of the EBNF that engines get, with a sampler and a recogniser: an independent check."""

import random
import re
import sys
from functools import cache

TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)+\]|\{\d+,\d+\}|[()|?]|[A-Za-z_][\w]*)')


def read(text: str) -> dict:
    """Return each rule as nested tuples: ("any", ...), ("all", ...), ("times", low, high, x), ..."""
    rules = {}
    for line in text.splitlines():
        name, _, body = line.partition(" ::= ")
        tokens, at = [], 0
        while at < len(body.rstrip()):
            match = TOKEN.match(body, at)
            assert match, f"{name}: {body[at : at + 40]}"
            tokens.append(match[1])
            at = match.end()
        rest = list(reversed(tokens))
        assert name not in rules
        rules[name] = _alternatives(rest)
        assert not rest, name
    return rules


def _alternatives(rest):
    options = [_sequence(rest)]
    while rest and rest[-1] == "|":
        rest.pop()
        options.append(_sequence(rest))
    return options[0] if len(options) == 1 else ("any", *options)


def _sequence(rest):
    parts = []
    while rest and rest[-1] not in {"|", ")"}:
        part = _atom(rest.pop(), rest)
        if rest and rest[-1] == "?":
            rest.pop()
            part = ("times", 0, 1, part)
        elif rest and rest[-1].startswith("{"):
            low, high = rest.pop()[1:-1].split(",")
            part = ("times", int(low), int(high), part)
        parts.append(part)
    return parts[0] if len(parts) == 1 else ("all", *parts)


def _atom(token, rest):
    if token == "(":
        inside = _alternatives(rest)
        assert rest.pop() == ")"
        return inside
    if token.startswith('"'):
        return ("text", token[1:-1].replace("\\n", "\n").replace('\\"', '"'))
    if token.startswith("["):
        return ("one", frozenset(_characters(token[1:-1])))
    return ("rule", token)


def _characters(inside):
    for match in re.finditer(r"(.)-(.)|(.)", inside):
        low, high, single = match.groups()
        yield from (single,) if single else map(chr, range(ord(low), ord(high) + 1))


def sample(rules: dict, rng: random.Random) -> str:
    """Return a random sentence: alternatives are alike likely, each repetition one in three."""

    def say(x):
        match x:
            case ("text", text):
                return text
            case ("one", characters):
                return rng.choice(sorted(characters))
            case ("rule", name):
                return say(rules[name])
            case ("any", *options):
                return say(rng.choice(options))
            case ("all", *parts):
                return "".join(map(say, parts))
            case ("times", low, high, part):
                count = low
                while count < high and rng.random() < 1 / 3:
                    count += 1
                return "".join(say(part) for _ in range(count))

    return say(rules["root"])


def accepts(rules: dict, text: str) -> bool:
    """Tell whether the whole text is a sentence."""

    @cache
    def ends(x, at: int) -> frozenset:
        match x:
            case ("text", expected):
                return frozenset({at + len(expected)} if text.startswith(expected, at) else ())
            case ("one", characters):
                return frozenset({at + 1} if text[at : at + 1] in characters - {""} else ())
            case ("rule", name):
                return ends(rules[name], at)
            case ("any", *options):
                return frozenset().union(*(ends(option, at) for option in options))
            case ("all", *parts):
                here = {at}
                for part in parts:
                    here = set().union(*(ends(part, i) for i in here))
                return frozenset(here)
            case ("times", low, high, part):
                here, found = {at}, {at} if low == 0 else set()
                for count in range(1, high + 1):
                    here = set().union(*(ends(part, i) for i in here))
                    found |= here if count >= low else set()
                return frozenset(found)

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return len(text) in ends(rules["root"], 0)
    finally:
        sys.setrecursionlimit(limit)
