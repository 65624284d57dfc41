"""Filters of system calls as programs for the kernel's packet-filter machine (seccomp(2)).

A filter is a list of instructions over `struct seccomp_data`: architecture, number and arguments of
the call. Nothing is written to memory and jumps go forward only.
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

ALLOW = 0x7FFF0000
KILL = 0x80000000


def refuse(error: int) -> int:
    """Return the verdict that fails the call with this error number."""
    return 0x00050000 | error


class Instruction(NamedTuple):
    """`struct sock_filter`: operation, how far to jump if true or false, operand."""

    code: int
    if_true: int
    if_false: int
    operand: int


_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in `struct seccomp_data`; an argument takes 8 bytes, its low half first."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A processor's name for the audit system, and its numbers of system calls."""

    audit: int
    calls: Mapping[str, int]
    foreign_from: int | None = None
    """First number of another ABI that shares the audit name (x32)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A verdict on one system call."""

    call: str
    verdict: int = ALLOW
    argument: int = 0
    """Which argument is looked at."""
    unless: int = 0
    """Where any of these bits is set in that argument, the filter's default holds instead."""


def assemble(
    architecture: Architecture, rules: tuple[Rule, ...], default: int
) -> list[Instruction]:
    """Write the filter: rules in order, then the default. Calls the architecture lacks are left out."""
    program = [
        Instruction(_LOAD, 0, 0, _ARCHITECTURE),
        Instruction(_JUMP_EQUAL, 1, 0, architecture.audit),
        Instruction(_RETURN, 0, 0, KILL),
        Instruction(_LOAD, 0, 0, _NUMBER),
    ]
    if architecture.foreign_from is not None:
        program += [
            Instruction(_JUMP_AT_LEAST, 0, 1, architecture.foreign_from),
            Instruction(_RETURN, 0, 0, KILL),
        ]
    for rule in rules:
        if rule.call not in architecture.calls:
            continue
        body = [Instruction(_RETURN, 0, 0, rule.verdict)]
        if rule.unless:
            body = [
                Instruction(_LOAD, 0, 0, _ARGUMENTS + 8 * rule.argument),
                Instruction(_JUMP_ANY_BIT, 0, 1, rule.unless),
                Instruction(_RETURN, 0, 0, default),
                *body,
            ]
        program.append(Instruction(_JUMP_EQUAL, 0, len(body), architecture.calls[rule.call]))
        program += body
    program.append(Instruction(_RETURN, 0, 0, default))
    return program


_WRITING = 0o3 | 0o100 | 0o1000 | 0o2000 | 0o20000000
"""Flags of open(2) that write: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE."""

COMPUTE_AND_ANSWER = (
    *(
        Rule(call)
        for call in (
            # memory
            "mmap", "munmap", "mremap", "mprotect", "madvise", "brk",
            # answering, and reading modules that are not loaded yet
            "read", "write", "close", "lseek", "pread64", "fstat", "newfstatat", "stat", "lstat", "getdents64",
            # locks, clocks, chance
            "futex", "sched_yield", "getcpu", "clock_gettime", "clock_getres", "getrandom",
            # ending
            "rt_sigreturn", "restart_syscall", "exit", "exit_group",
        )
    ),
    Rule("openat", argument=2, unless=_WRITING),
    Rule("open", argument=1, unless=_WRITING),
)  # fmt: skip
"""What a slow policy's process may ask of the kernel; all else fails with EPERM."""
DENIED = refuse(errno.EPERM)

ARCHITECTURES: dict[str, Architecture] = {
    "x86_64": Architecture(
        0xC000003E,
        {
            "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "mmap": 9,
            "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigreturn": 15, "pread64": 17, "sched_yield": 24, "mremap": 25,
            "madvise": 28, "exit": 60, "futex": 202, "getdents64": 217, "restart_syscall": 219, "clock_gettime": 228,
            "clock_getres": 229, "exit_group": 231, "openat": 257, "newfstatat": 262, "getcpu": 309, "seccomp": 317,
            "getrandom": 318, "capset": 126, "landlock_create_ruleset": 444, "landlock_add_rule": 445,
            "landlock_restrict_self": 446,
        },
        foreign_from=0x40000000,
    ),
    "aarch64": Architecture(
        0xC00000B7,
        {
            "openat": 56, "close": 57, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "pread64": 67,
            "newfstatat": 79, "fstat": 80, "capset": 91, "exit": 93, "exit_group": 94, "futex": 98,
            "clock_gettime": 113, "clock_getres": 114, "sched_yield": 124, "restart_syscall": 128, "rt_sigreturn": 139,
            "getcpu": 168, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
            "seccomp": 277, "getrandom": 278, "landlock_create_ruleset": 444, "landlock_add_rule": 445,
            "landlock_restrict_self": 446,
        },
    ),
}  # fmt: skip
"""By the machine's name as uname(2) has it."""
