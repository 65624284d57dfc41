"""Calls of the kernel that Python has no function for: no_new_privs, capabilities, Landlock, seccomp.

Each raises OSError where the kernel refuses. All take effect for the calling thread, and for good.
"""

import ctypes
import os
from collections.abc import Iterable

from autopoiesis.arms.sandbox.bpf import (
    ARCHITECTURES,
    COMPUTE_AND_ANSWER,
    DENIED,
    Architecture,
    Instruction,
    assemble,
)

_LIBC = ctypes.CDLL(None, use_errno=True)

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_LANDLOCK_VERSION_QUERY, _LANDLOCK_PATH_BENEATH = 1, 1
_CAPABILITY_VERSION_3 = 0x20080522

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILES_SINCE = {1: 13, 2: 14, 3: 15, 5: 16}
"""Landlock ABI: how many kinds of access to files it handles from then on."""
_TCP = 0b11
"""bind and connect; since ABI 4."""
_SCOPES = 0b11
"""Abstract UNIX sockets and signals; since ABI 6."""


class _Ruleset(ctypes.Structure):
    _fields_ = [
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


class _Filter(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filters", ctypes.POINTER(_Filter))]


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


def architecture() -> Architecture | None:
    """Return the machine's architecture, None if its system calls are not known here."""
    return ARCHITECTURES.get(os.uname().machine)


def give_up_privileges() -> None:
    """Let neither setuid programs nor capabilities give this process more than it has, and no one trace it."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    _call("capset", ctypes.byref(header), none)


def landlock_version() -> int:
    """Return the ABI of Landlock that the kernel offers, 0 if it has none."""
    try:
        query = ctypes.c_uint(_LANDLOCK_VERSION_QUERY)
        return _call("landlock_create_ruleset", None, ctypes.c_size_t(0), query)
    except OSError:
        return 0


def close_files(readable: Iterable[str]) -> None:
    """Let this process read what lies beneath these paths, and touch no other file, nor TCP.

    Where the kernel can, it reaches no process outside with signals or abstract sockets either. Files
    that are open stay open.
    """
    version = landlock_version()
    if not version:
        raise OSError("the kernel has no Landlock")
    kinds = max(count for since, count in _FILES_SINCE.items() if since <= version)
    ruleset = _Ruleset(
        handled_access_fs=(1 << kinds) - 1,
        handled_access_net=_TCP if version >= 4 else 0,
        scoped=_SCOPES if version >= 6 else 0,
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    fd = _call(
        "landlock_create_ruleset", ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint(0)
    )
    try:
        for path in readable:
            _allow_reading(fd, path)
        _call("landlock_restrict_self", ctypes.c_int(fd), ctypes.c_uint(0))
    finally:
        os.close(fd)


def _allow_reading(ruleset: int, path: str) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        access = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE  # noqa: PTH112
        rule = _PathBeneath(allowed_access=access, parent_fd=parent)
        _call(
            "landlock_add_rule",
            ctypes.c_int(ruleset),
            ctypes.c_int(_LANDLOCK_PATH_BENEATH),
            ctypes.byref(rule),
            ctypes.c_uint(0),
        )
    finally:
        os.close(parent)


def filter_calls() -> None:
    """Let this process, all its threads, ask the kernel only for what computing and answering take."""
    here = architecture()
    if here is None:
        raise OSError(f"system calls of {os.uname().machine} are not known here")
    install(assemble(here, COMPUTE_AND_ANSWER, DENIED))


def install(instructions: list[Instruction]) -> None:
    """Put a filter before every system call of this process."""
    filters = (_Filter * len(instructions))(*(_Filter(*i) for i in instructions))
    program = _Program(len(instructions), filters)
    _call(
        "seccomp",
        ctypes.c_uint(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_uint(_SECCOMP_FILTER_FLAG_TSYNC),
        ctypes.byref(program),
    )


def _call(name: str, *arguments: object) -> int:
    here = architecture()
    if here is None:
        raise OSError(f"system calls of {os.uname().machine} are not known here")
    result = _LIBC.syscall(ctypes.c_long(here.calls[name]), *arguments)
    if result != 0 and (result < 0 or name == "seccomp"):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(ctypes.c_int(option), ctypes.c_ulong(value), *(ctypes.c_ulong(0),) * 3):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")
