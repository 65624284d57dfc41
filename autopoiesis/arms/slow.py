"""Slow policies: when a fleet is rescheduled and into what plan, as ordinary Python.

`verify_slow` reads a policy's text before anything runs it. It is a first fence, which tells authors
early what will not work; the wall is the process that the policy runs in (`sandbox`), whose kernel
denies what the text may have hidden.
"""

import ast
import io
import tokenize
from dataclasses import dataclass
from typing import NoReturn

from autopoiesis.arms.arm import text_id
from autopoiesis.arms.lexis import PolicyError, plain_text

SLOW_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "should_reschedule": ("window", "fleet", "plan"),
    "schedule": ("window", "fleet", "plan"),
}
"""A slow policy's functions and their parameters; both are required."""
GIVEN = ("Plan", "ReplicaGroup")
"""Names that are there without an import."""
MODULES = (
    "bisect",
    "collections",
    "dataclasses",
    "functools",
    "heapq",
    "itertools",
    "math",
    "statistics",
    "typing",
    "numpy",
    "numpy.linalg",
    "numpy.random",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.sparse",
    "scipy.special",
)
"""Modules that a slow policy may import."""

MAX_SLOW_BYTES = 24_576
MAX_SLOW_LINES = 800
MAX_SLOW_NODES = 10_000
"""Statements and expressions."""

_TOP_LEVEL = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom)
_NO_STATEMENTS: dict[type[ast.AST], str] = {
    ast.Global: "it keeps no state between calls; pass values as arguments",
    ast.AsyncFunctionDef: "write a plain def",
    ast.AsyncFor: "write a plain for",
    ast.AsyncWith: "leave it out",
    ast.Await: "leave it out",
}
_NO_NAMES = frozenset(
    {
        "breakpoint", "compile", "copyright", "credits", "delattr", "dir", "eval", "exec", "exit",
        "getattr", "globals", "help", "input", "license", "locals", "memoryview", "open", "quit",
        "setattr", "vars",
    }
)  # fmt: skip
_NO_ATTRIBUTES = frozenset(
    {
        "ag_code", "ag_frame", "cr_code", "cr_frame", "f_back", "f_builtins", "f_code", "f_globals",
        "f_locals", "gi_code", "gi_frame", "gi_yieldfrom", "tb_frame", "tb_next",
    }
)  # fmt: skip
_LAYOUT = frozenset(
    {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)


@dataclass(frozen=True, slots=True)
class SlowPolicy:
    """A slow policy whose text was found in order."""

    source: str
    """Normalised source: without comments, blank lines and trailing blanks."""
    id: str
    """First 12 hex digits of the SHA-256 of `source`."""
    modules: tuple[str, ...]
    """Those of `MODULES` that it imports."""


def verify_slow(source: str | bytes) -> SlowPolicy:
    """Check a slow policy's text and return it normalised; nothing of it is run.

    Verifying normalised source returns it unchanged. Raises PolicyError, whatever the input.
    """
    text = plain_text(source, MAX_SLOW_BYTES)
    if text.count("\n") > MAX_SLOW_LINES:
        raise PolicyError(f"the source has over {MAX_SLOW_LINES} lines; write a shorter policy")
    try:
        tree = ast.parse(text)
        modules = _Fence().read(tree)
        normalised = _normalised(text)
        if ast.dump(ast.parse(normalised)) != ast.dump(tree):
            raise PolicyError("it reads differently without its comments; write it more plainly")
    except SyntaxError as error:
        reason = " ".join(str(error.msg).split())
        raise PolicyError(
            f"line {error.lineno or 1}: not valid Python: {reason}; correct it"
        ) from None
    except (RecursionError, MemoryError, tokenize.TokenError, ValueError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError("it is nested too deeply to read; use local names") from None
    return SlowPolicy(normalised, text_id(normalised), tuple(sorted(modules)))


class _Fence:
    """Walks a module's syntax tree and refuses what a slow policy has no need of."""

    def __init__(self) -> None:
        self.modules: set[str] = set()

    def read(self, tree: ast.Module) -> set[str]:
        """Check the whole module; return the modules that it imports."""
        nodes = 0
        for node in ast.walk(tree):
            nodes += isinstance(node, ast.expr | ast.stmt)
            if nodes > MAX_SLOW_NODES:
                raise PolicyError(
                    f"it has over {MAX_SLOW_NODES} operations; write a shorter policy"
                )
            self.node(node)
        for i, statement in enumerate(tree.body):
            docstring = (
                i == 0
                and isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
            )
            if not docstring and not isinstance(statement, _TOP_LEVEL):
                what = "only imports, constants, functions and classes stand at the top level"
                _refuse(statement, f"{what}; leave this out, or put it into a function")
        self.functions(tree)
        return self.modules

    def functions(self, tree: ast.Module) -> None:
        defined: set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in SLOW_FUNCTIONS:
                signature = ", ".join(SLOW_FUNCTIONS[node.name])
                if node.name in defined:
                    _refuse(node, f"`{node.name}` is defined twice; keep one")
                arguments = node.args
                names = tuple(
                    argument.arg for argument in (*arguments.posonlyargs, *arguments.args)
                )
                plain = not (arguments.vararg or arguments.kwonlyargs or arguments.kwarg)
                if names != SLOW_FUNCTIONS[node.name] or not plain:
                    _refuse(node, f"the parameters differ; write def {node.name}({signature}):")
                if node.decorator_list:
                    _refuse(node, f"leave the decorators of `{node.name}` out")
                defined.add(node.name)
        for name, parameters in SLOW_FUNCTIONS.items():
            if name not in defined:
                raise PolicyError(
                    f"line 1: `{name}` is missing; add def {name}({', '.join(parameters)})"
                )

    def node(self, node: ast.AST) -> None:
        """Refuse the node if it is one of those that are not let through."""
        if type(node) in _NO_STATEMENTS:
            _refuse(node, f"`{type(node).__name__}`: {_NO_STATEMENTS[type(node)]}")
        match node:
            case ast.Import(names=names):
                for name in names:
                    self.allow(node, name.name)
            case ast.ImportFrom():
                self.from_import(node)
            case ast.Attribute(attr=name):
                self.attribute(node, name)
            case ast.MatchClass(kwd_attrs=names):
                for name in names:
                    self.attribute(node, name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.ClassDef(name=name):
                self.name(node, name)
            case ast.alias(name=name, asname=asname):
                self.name(node, name)
                self.name(node, asname or "")
            case ast.FunctionDef(name=name):
                method = name.startswith("__") and name.endswith("__")
                if not method:
                    self.name(node, name)
            case _:
                pass

    def name(self, node: ast.AST, name: str) -> None:
        if name.startswith("__") or name in _NO_NAMES:
            _refuse(node, f"`{name[:40]}` is closed to policies; leave it out")

    def attribute(self, node: ast.AST, name: str) -> None:
        if name.startswith("__") or name in _NO_ATTRIBUTES:
            _refuse(node, f"attribute `{name[:40]}` is closed to policies; leave it out")

    def from_import(self, node: ast.ImportFrom) -> None:
        if node.level or not node.module:
            _refuse(
                node, "there is nothing to import from beside it; write from MODULE import NAME"
            )
        if node.module == "__future__":
            return
        for alias in node.names:
            if alias.name == "*":
                _refuse(node, f"name what you import from {node.module}")
            whole = f"{node.module}.{alias.name}"
            self.allow(node, whole if whole in MODULES else node.module)

    def allow(self, node: ast.AST, module: str) -> None:
        if module.partition(".")[0] == "autopoiesis":
            _refuse(node, f"{' and '.join(GIVEN)} are there already; leave the import out")
        if module not in MODULES:
            _refuse(node, f"`{module[:40]}` cannot be imported, only {', '.join(MODULES)}")
        self.modules.add(module)


def _refuse(node: ast.AST, what: str) -> NoReturn:
    raise PolicyError(f"line {getattr(node, 'lineno', 1)}: {what}")


def _normalised(text: str) -> str:
    """Return the text without comments, blank lines and blanks at line ends; strings stay as they are."""
    rows: set[int] = set()  # that hold more than a comment
    inside: set[int] = set()  # whose end lies in a string
    comments: dict[int, int] = {}  # row: column
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (first, column), (last, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            comments[first] = column
        elif token.type not in _LAYOUT:
            rows.update(range(first, last + 1))
            inside.update(range(first, last))
    lines = text.split("\n")
    return "".join(
        (lines[row - 1] if row in inside else lines[row - 1][: comments.get(row)].rstrip()) + "\n"
        for row in sorted(rows)
    )
