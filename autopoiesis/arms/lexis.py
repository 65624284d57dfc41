"""The first look at a policy's text: only the language's own tokens, within bounds.

Python's parser is made for trusted text: a few kilobytes of minus signs or brackets exhaust its
memory or its stack. So nothing reaches it that has not passed here.
"""

import re

MAX_BYTES = 8192
MAX_LINES = 300
MAX_TOKENS = 2500
MAX_STATEMENT_TOKENS = 300
MAX_BRACKETS = 24
MAX_INDENT = 80
"""Columns of indentation."""
MAX_PREFIX = 6
"""Signs and `not`s in a row."""


class PolicyError(ValueError):
    """A policy was refused. The message names the line, what is wrong and what to write instead."""


_TOKEN = re.compile(
    r"""(?P<space>[ \t]+)
      | (?P<newline>\n)
      | (?P<comment>\#[^\n]*)
      | (?P<string>\"{3}[^\\]*?\"{3} | '{3}[^\\]*?'{3} | "[^"\\\n]*" | '[^'\\\n]*')
      | (?P<name>[A-Za-z_]\w*)
      | (?P<number>(?:\d(?:_?\d)*\.?(?:\d(?:_?\d)*)? | \.\d(?:_?\d)*)(?:[eE][-+]?\d+)?)
      | (?P<foreign>//=? | -> | := | << | >> | <> | \.\.\.)
      | (?P<operator>\*\*=? | [-+*/%]= | [<>=!]= | [-+*/%<>=(),:.])
      | (?P<other>.)""",
    re.ASCII | re.DOTALL | re.VERBOSE,
)

_INSTEAD = {
    "//": "write floor(a / b)",
    "//=": "write x = floor(x / y)",
    "->": "leave the annotations out",
    ":=": "assign on a line of its own",
    "[": "there are no lists and no subscripts; read declared fields such as replica.in_flight",
    "{": "there are no dictionaries and no sets; use local names",
    "@": "leave the decorators out",
    ";": "put each statement on a line of its own",
    "\\": "put a long expression in parentheses, and no backslash in a docstring",
    "&": "write `and` in a condition",
    "|": "write `or` in a condition",
    "~": "write `not` in a condition",
    "^": "write ** for a power",
    "!": "write `not` in a condition",
    '"': "only a docstring in closed quotes may be text",
    "'": "only a docstring in closed quotes may be text",
}


def plain_text(source: object, max_bytes: int = MAX_BYTES) -> str:
    r"""Return the source as ASCII text with `\n` line ends; PolicyError if it is not such text."""
    if isinstance(source, bytes | bytearray):
        source = bytes(source[: max_bytes + 1]).decode("latin-1")
    if not isinstance(source, str):
        raise PolicyError(f"a policy is source text, not {type(source).__name__}; pass a str")
    if len(source) > max_bytes:
        raise PolicyError(f"the source is over {max_bytes} bytes; write a shorter policy")
    text = source.replace("\r\n", "\n").replace("\r", "\n")
    for i, character in enumerate(text):
        if not (" " <= character <= "~" or character in "\n\t"):
            raise PolicyError(
                f"line {_line(text, i)}: character {character!a} is not plain ASCII text; "
                "write ASCII only, in comments too"
            )
    return text


def check_tokens(text: str) -> None:
    """Refuse text with a token that the language lacks, or more of anything than its bounds."""
    if text.count("\n") > MAX_LINES:
        raise PolicyError(f"the source has over {MAX_LINES} lines; write a shorter policy")
    tokens = statement = brackets = prefix = 0
    fresh_line = True
    word_end = -1
    for match in _TOKEN.finditer(text):
        kind, piece, at = match.lastgroup, match.group(), match.start()
        if kind == "space":
            if fresh_line and brackets == 0 and len(piece.expandtabs()) > MAX_INDENT:
                raise _refusal(text, at, f"indented over {MAX_INDENT} columns", "nest fewer ifs")
            continue
        if kind == "comment":
            continue
        fresh_line = kind == "newline"
        if kind == "newline":
            if brackets == 0:
                statement = 0
            continue
        if kind in {"foreign", "other"} or (kind == "string" and word_end == at):
            instead = _INSTEAD.get(piece, "use only names, numbers and + - * / % ** ( ) , : . =")
            shown = piece[:20].partition("\n")[0]
            raise _refusal(text, at, f"`{shown}` is not part of the language", instead)
        if word_end == at and kind in {"name", "number"}:
            raise _refusal(text, at, f"`{piece[:20]}` touches the number before it", "put a space")
        word_end = match.end() if kind in {"name", "number"} else -1
        tokens += 1
        statement += 1
        brackets += (piece == "(") - (piece == ")")
        prefix = prefix + 1 if piece in {"-", "+", "not"} else 0
        if brackets < 0:
            raise _refusal(text, at, "a bracket closes that was never opened", "remove it")
        if brackets > MAX_BRACKETS:
            raise _refusal(text, at, f"over {MAX_BRACKETS} brackets deep", "use local names")
        if prefix > MAX_PREFIX:
            raise _refusal(text, at, f"over {MAX_PREFIX} signs in a row", "one sign is enough")
        if statement > MAX_STATEMENT_TOKENS:
            raise _refusal(text, at, "this statement is too long", "split it with local names")
        if tokens > MAX_TOKENS:
            raise _refusal(text, at, f"over {MAX_TOKENS} tokens", "write a shorter policy")


def thought_of(source: str) -> str:
    """Return what the author says of the policy: its module docstring, or its leading comments."""
    comments: list[str] = []
    for match in _TOKEN.finditer(source[: 4 * MAX_BYTES]):
        kind, token = match.lastgroup, match.group()
        if kind == "comment":
            comments.append(token.lstrip("#").strip())
        elif kind == "string" and not comments:
            return token.strip("\"'").strip()
        elif kind not in {"space", "newline"}:
            break
    return "\n".join(comments).strip()


def _refusal(text: str, at: int, what: str, instead: str) -> PolicyError:
    return PolicyError(f"line {_line(text, at)}: {what}; {instead}")


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
