"""Compile verified policies to register code for `machine.execute`.

Registers: features, then one constant per literal of the source, then temporaries, which the
functions of a policy share. Jumps go forward only.
"""

import ast
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.features import FIRST_CONSTANT, FUNCTIONS, INPUTS
from autopoiesis.arms.language import Policy
from autopoiesis.arms.literals import finite_values, literal_nodes, value_of
from autopoiesis.arms.machine import Op, Program

_BINARY: dict[type[ast.operator], Op] = {
    ast.Add: Op.ADD,
    ast.Sub: Op.SUB,
    ast.Mult: Op.MUL,
    ast.Div: Op.DIV,
    ast.Mod: Op.MOD,
    ast.Pow: Op.POW,
}
_CALLS: dict[str, Op] = {
    "min": Op.MIN,
    "max": Op.MAX,
    "abs": Op.ABS,
    "sqrt": Op.SQRT,
    "exp": Op.EXP,
    "log": Op.LOG,
    "floor": Op.FLOOR,
    "ceil": Op.CEIL,
}
# comparison: (jump unless it holds, operands swapped)
_UNLESS: dict[type[ast.cmpop], tuple[Op, bool]] = {
    ast.Lt: (Op.JUMP_UNLESS_LT, False),
    ast.LtE: (Op.JUMP_UNLESS_LE, False),
    ast.Gt: (Op.JUMP_UNLESS_LT, True),
    ast.GtE: (Op.JUMP_UNLESS_LE, True),
    ast.Eq: (Op.JUMP_UNLESS_EQ, False),
    ast.NotEq: (Op.JUMP_UNLESS_NE, False),
}
_OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_FEATURES: dict[tuple[str, str], int] = {
    (parameter, field): first + i
    for parameter, (declared, first) in INPUTS.items()
    for i, field in enumerate(declared._fields)
}


def compile_policy(policy: Policy) -> Program:
    """Compile a verified policy."""
    tree = ast.parse(policy.source)
    literals = literal_nodes(tree)
    constants = {id(node): FIRST_CONSTANT + i for i, node in enumerate(literals)}
    first_temporary = FIRST_CONSTANT + len(literals)
    code: list[list[int]] = []
    entry = np.full(len(FUNCTIONS), -1, np.int64)
    registers = first_temporary
    for node in tree.body:
        assert isinstance(node, ast.FunctionDef), "canonical source holds only functions"
        entry[list(FUNCTIONS).index(node.name)] = len(code)
        function = _Function(node, constants, first_temporary, code)
        registers = max(registers, function.highest)
    values = np.zeros(registers)
    values[FIRST_CONSTANT:first_temporary] = [value_of(node) for node in literals]
    return Program(np.array(code, np.int32), entry, values, len(literals))


def constants_of(program: Program) -> NDArray[np.float64]:
    """Return a copy of the program's constants, in the order of the source's literals."""
    return program.registers[FIRST_CONSTANT : FIRST_CONSTANT + program.constants].copy()


def with_constants(program: Program, values: Sequence[float]) -> Program:
    """Return the program with other constants; the code is shared, not copied.

    Raises ValueError unless as many finite values come as the program has constants.
    """
    registers = program.registers.copy()
    end = FIRST_CONSTANT + program.constants
    registers[FIRST_CONSTANT:end] = finite_values(values, program.constants)
    return program._replace(registers=registers)


class _Function:
    """Appends one function's instructions to `code`."""

    def __init__(
        self, node: ast.FunctionDef, constants: dict[int, int], first: int, code: list[list[int]]
    ) -> None:
        self.code = code
        self.constants = constants
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        stored = dict.fromkeys(n.id for n in names if isinstance(n.ctx, ast.Store))
        self.locals = {name: first + i for i, name in enumerate(stored)}
        self.top = self.highest = first + len(self.locals)
        self.block(node.body)

    def emit(self, op: Op, target: int = 0, a: int = 0, b: int = 0) -> list[int]:
        instruction = [int(op), target, a, b]
        self.code.append(instruction)
        return instruction

    def land(self, jumps: list[list[int]]) -> None:
        """Let these jumps lead to the next instruction."""
        for jump in jumps:
            jump[1] = len(self.code)

    def temporary(self) -> int:
        self.top += 1
        self.highest = max(self.highest, self.top)
        return self.top - 1

    # --- statements: each returns True if no path goes on after it

    def block(self, statements: list[ast.stmt]) -> bool:
        ended = False
        for statement in statements:
            ended = self.statement(statement)
        return ended

    def statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Return(value=ast.expr() as value):
                self.emit(Op.RETURN, a=self.value(value))
                ended = True
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.value(value, self.locals[name])
                ended = False
            case ast.If(test=test, body=body, orelse=orelse):
                ended = self.branch(test, body, orelse)
            case _:
                raise AssertionError(f"{type(node).__name__} in canonical source")
        return ended

    def branch(self, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt]) -> bool:
        otherwise = self.jump(test, when=False)
        ended = self.block(body)
        leaving = [] if ended or not orelse else [self.emit(Op.JUMP)]
        self.land(otherwise)
        ended = self.block(orelse) and ended
        self.land(leaving)
        return ended

    # --- conditions

    def jump(self, node: ast.expr, when: bool) -> list[list[int]]:
        """Emit code that jumps if the condition is `when`; return the jumps, still without aim."""
        match node:
            case ast.UnaryOp(operand=operand):
                jumps = self.jump(operand, not when)
            case ast.BoolOp(op=op, values=[*before, last]):
                decisive = isinstance(op, ast.Or)  # a part that is so decides the whole
                early = [j for part in before for j in self.jump(part, decisive)]
                jumps = self.jump(last, when)
                if when == decisive:
                    jumps += early
                else:
                    self.land(early)
            case ast.Compare(left=left, ops=[*before, last], comparators=comparators):
                mark = self.top
                registers = [self.value(left)]
                early = []
                for op, right in zip(before, comparators, strict=False):
                    registers.append(self.value(right))
                    early.append(self.unless(type(op), registers[-2], registers[-1]))
                registers.append(self.value(comparators[-1]))
                op = _OPPOSITE[type(last)] if when else type(last)
                jumps = [self.unless(op, registers[-2], registers[-1])]
                if when:
                    self.land(early)
                else:
                    jumps += early
                self.top = mark
            case _:
                raise AssertionError(f"{type(node).__name__} as condition in canonical source")
        return jumps

    def unless(self, comparison: type[ast.cmpop], a: int, b: int) -> list[int]:
        op, swapped = _UNLESS[comparison]
        return self.emit(op, 0, *((b, a) if swapped else (a, b)))

    # --- values

    def value(self, node: ast.expr, target: int | None = None) -> int:
        """Emit code that computes the value; return its register, `target` if one is given."""
        place = self.placed(node)
        if place is not None:
            if target is not None:
                self.emit(Op.COPY, target, place)
                return target
            return place
        if isinstance(node, ast.IfExp):
            return self.choice(node, self.temporary() if target is None else target)
        mark = self.top
        match node:
            case ast.BinOp(left=left, op=op, right=right):
                arguments, last = [self.value(left), self.value(right)], _BINARY[type(op)]
            case ast.UnaryOp(operand=operand):
                arguments, last = [self.value(operand)], Op.NEG
            case ast.Call(func=ast.Name(id="clip"), args=args):
                x, low, high = [self.value(argument) for argument in args]
                raised = self.temporary()
                self.emit(Op.MAX, raised, x, low)
                arguments, last = [raised, high], Op.MIN
            case ast.Call(func=ast.Name(id=name), args=args):
                arguments, last = [self.value(argument) for argument in args], _CALLS[name]
                while len(arguments) > 2:
                    a, b, *others = arguments
                    so_far = self.temporary()
                    self.emit(last, so_far, a, b)
                    arguments = [so_far, *others]
            case _:
                raise AssertionError(f"{type(node).__name__} as value in canonical source")
        self.top = mark
        into = self.temporary() if target is None else target
        self.emit(last, into, *arguments)
        return into

    def placed(self, node: ast.expr) -> int | None:
        """Return the register that holds the value already, None if it must be computed."""
        if id(node) in self.constants:
            return self.constants[id(node)]
        match node:
            case ast.Name(id=name):
                return self.locals[name]
            case ast.Attribute(value=ast.Name(id=parameter), attr=field):
                return _FEATURES[parameter, field]
            case _:
                return None

    def choice(self, node: ast.IfExp, into: int) -> int:
        mark = self.top
        otherwise = self.jump(node.test, when=False)
        self.value(node.body, into)
        leaving = self.emit(Op.JUMP)
        self.land(otherwise)
        self.value(node.orelse, into)
        self.land([leaving])
        self.top = mark
        return into
