"""One text, two policies: fast and slow functions may stand in one file."""

import ast
import re

from autopoiesis.arms.features import FUNCTIONS
from autopoiesis.arms.lexis import MAX_BYTES, PolicyError, plain_text
from autopoiesis.arms.slow import MAX_SLOW_BYTES, SLOW_FUNCTIONS

_SLOW = re.compile(rf"^def[ \t]+(?:{'|'.join(SLOW_FUNCTIONS)})\b", re.MULTILINE)


def parts_of(source: str | bytes) -> tuple[str | bytes, str]:
    """Split a text into its fast and its slow part, each line of which stays where it was.

    Fast are the functions with the names and parameters of fast ones; all else is slow, if there is a slow
    function, and stays fast if there is none. An empty part is not there. Raises PolicyError.
    """
    text = source if isinstance(source, str) else source.decode("latin-1")
    if not _SLOW.search(text.replace("\r", "\n")):
        return source, ""
    text = plain_text(source, MAX_BYTES + MAX_SLOW_BYTES)
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        reason = " ".join(str(error.msg).split())
        raise PolicyError(
            f"line {error.lineno or 1}: not valid Python: {reason}; correct it"
        ) from None
    except (RecursionError, MemoryError, ValueError):
        raise PolicyError("it is nested too deeply to read; use local names") from None
    lines = text.split("\n")
    fast_rows = {row for node in tree.body if _is_fast(node) for row in _rows(node)}
    fast, slow = (
        "\n".join(line if (row in fast_rows) is wanted else "" for row, line in enumerate(lines, 1))
        for wanted in (True, False)
    )
    return fast if fast_rows else "", slow


def _is_fast(node: ast.stmt) -> bool:
    """Tell a fast function from a slow policy's own that happens to have its name."""
    if not isinstance(node, ast.FunctionDef) or node.name not in FUNCTIONS:
        return False
    return tuple(argument.arg for argument in node.args.args) == FUNCTIONS[node.name]


def _rows(node: ast.stmt) -> range:
    """Return the rows of a function, from its first decorator on."""
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return range(first, (node.end_lineno or node.lineno) + 1)
