"""Attacks on the sandbox: what slow policies could try, and what must come of it.

Each is the body of `schedule`, which runs for real, unverified, in a process that is shut off. One that
succeeds says "got through". `window.requests` is the id of the parent's process, `plan.groups[0].gpu` a
file of the parent's that holds a secret.
"""

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Attack:
    body: str
    says: str
    """What the fault must say (a pattern)."""
    fence: bool = False
    """Whether the text gets past the first fence."""
    deadline_s: float = 10.0


TRIGGER = "def should_reschedule(window, fleet, plan):\n    return True\n\n"
HEAD = "def schedule(window, fleet, plan):\n"


def source_of(attack):
    """Make a policy that attacks when it is asked for a plan."""
    return TRIGGER + HEAD + body_of(attack)


def source_of_all(attacks):
    """Make one policy of many attacks; `window.completed` says which one comes."""
    parts = [
        f"def attack_{i}(window, fleet, plan):\n" + body_of(attack)
        for i, attack in enumerate(attacks)
    ]
    choice = "    return globals()[f'attack_{window.completed}'](window, fleet, plan)\n"
    return "\n".join([TRIGGER, *parts, HEAD + choice])


def body_of(attack):
    return textwrap.indent(textwrap.dedent(attack.body), "    ") + "\n"


def tries(body, says="PermissionError", **more):
    return Attack(
        textwrap.dedent(body).strip() + "\nraise AssertionError('got through')\n", says, **more
    )


def denied(*calls):
    """An attack that makes each of these calls, which all must be denied."""
    lines = "".join(f"attempt(lambda: {call})\n" for call in calls)
    return tries(
        "import os, sys\n"
        "def attempt(call):\n"
        "    try:\n"
        "        call()\n"
        "    except PermissionError:\n"
        "        return\n"
        "    raise AssertionError('got through')\n"
        f"{lines}raise PermissionError('all of them')"
    )


def system_call(*numbers):
    """An attack by number, x86-64's and that of the others, with arguments that a kernel would take."""
    return tries(f"""
        import ctypes, platform
        libc = ctypes.CDLL(None, use_errno=True)
        for x86, other in {numbers!r}:
            number = x86 if platform.machine() == "x86_64" else other
            if number is None:
                continue
            ctypes.set_errno(0)
            if libc.syscall(ctypes.c_long(number), 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
                raise AssertionError(f"got through: {{number}}, errno {{ctypes.get_errno()}}")
        raise PermissionError("all of them")
    """)


FIND_PIPES = """
import os, stat, sys
def is_pipe(fd):
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False
requests, answers = [fd for fd in range(3, 64) if is_pipe(fd)]
"""

DENIED: dict[str, Attack] = {
    # --- files ---
    "read a file": tries("open('/etc/passwd').read()"),
    "read the parent's file": tries("open(plan.groups[0].gpu).read()"),
    "read the parent's environment": tries("open(f'/proc/{window.requests}/environ', 'rb').read()"),
    "read its own environment": tries("open('/proc/self/environ', 'rb').read()"),
    "read the parent's memory": tries("open(f'/proc/{window.requests}/mem', 'rb').read(1)"),
    "list a folder": denied("os.listdir('/')", "os.listdir('/tmp')", "os.listdir('/proc')", "os.scandir('/root')"),
    "write a file": denied(
        "open('/tmp/attack', 'w')",
        "open(plan.groups[0].gpu, 'a')",
        "open(os.__file__, 'r+')",
        "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
        "os.open('/tmp/attack', os.O_CREAT)",
        "open('/dev/shm/attack', 'w')",
    ),
    "overwrite its own memory": tries("open('/proc/self/mem', 'r+b')"),
    "change the tree": denied(
        "os.mkdir('/tmp/attack')",
        "os.unlink(plan.groups[0].gpu)",
        "os.rename(plan.groups[0].gpu, '/tmp/attack')",
        "os.chmod(plan.groups[0].gpu, 0o777)",
        "os.truncate(plan.groups[0].gpu, 0)",
        "os.utime(plan.groups[0].gpu)",
        "os.mkfifo('/tmp/attack')",
        "os.chdir('/')",
        "os.chroot('/tmp')",
    ),
    "symbolic link": denied(
        "os.symlink(plan.groups[0].gpu, '/tmp/attack')", "os.link(plan.groups[0].gpu, '/tmp/attack')"
    ),
    "read through a link": tries("open('/proc/self/root/etc/passwd').read()"),
    "read through dots": tries("import os\nopen(os.path.dirname(os.__file__) + '/..' * 20 + '/etc/passwd').read()"),
    "open without reading, then read": tries(
        "import os\nopen(f\"/proc/self/fd/{os.open('/etc/passwd', os.O_PATH)}\").read()"
    ),
    "read a link's target": tries("import os\nos.readlink('/proc/self/exe')"),
    # --- network ---
    "TCP": tries("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)"),
    "UDP": tries("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)"),
    "UNIX socket": tries("import socket\nsocket.socket(socket.AF_UNIX)"),
    "pair of sockets": tries("import socket\nsocket.socketpair()"),
    "netlink": tries("import socket\nsocket.socket(16, socket.SOCK_RAW)"),
    "resolve a name": tries("import socket\nsocket.getaddrinfo('example.org', 80)", "gaierror|PermissionError|OSError"),
    "fetch a page": tries("import urllib.request\nurllib.request.urlopen('http://127.0.0.1/')", "Error"),
    # --- processes ---
    "fork": tries("import os\nos.fork()"),
    "fork bomb": tries("import os\nwhile True:\n    os.fork()"),
    "a shell": tries("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])"),
    "another program": denied("os.execv('/bin/true', ['true'])", "os.posix_spawn('/bin/true', ['true'], {})"),
    "system": tries("import os\nif os.system('true') != 0:\n    raise PermissionError"),
    "multiprocessing": tries("import multiprocessing\nmultiprocessing.Process(target=print).start()", "Error"),
    "a thread": tries("import threading\nthreading.Thread(target=print).start()", "can't start new thread"),
    "thread bomb": tries(
        "import threading\nwhile True:\n    threading.Thread(target=lambda: open('/dev/zero').read()).start()",
        "can't start new thread",
    ),
    "kill the parent": denied(
        "os.kill(window.requests, 9)", "os.kill(window.requests, 0)", "os.killpg(0, 9)", "os.kill(-1, 9)",
        "os.kill(1, 15)",
    ),
    "trace the parent": tries("""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(16, window.requests, 0, 0) == -1:  # PTRACE_ATTACH
            raise PermissionError(ctypes.get_errno())
    """),
    # --- the kernel, by number ---
    "processes by number": system_call((56, 220), (57, None), (58, None), (435, 435), (59, 221), (322, 281)),
    "signals by number": system_call((62, 129), (200, 130), (234, 131), (129, 138), (297, 240), (424, 424), (434, 434)),
    "other processes' memory by number": system_call((101, 117), (310, 270), (311, 271), (312, 272), (440, 440)),
    "sockets by number": system_call((41, 198), (42, 203), (49, 200), (53, 199), (46, 211), (47, 212), (307, 269)),
    "io_uring": system_call((425, 425), (426, 426), (427, 427)),
    "bpf": system_call((321, 280)),
    "mount": system_call((165, 40), (166, 39), (428, 428), (429, 429), (430, 430), (155, 41)),
    "namespaces": system_call((272, 97), (308, 268), (161, 51)),
    "keyrings": system_call((248, 217), (249, 218), (250, 219)),
    "kernel modules and reboot": system_call((175, 105), (313, 273), (169, 142), (246, 104)),
    "clocks and timers": system_call((227, 112), (305, 266), (38, 103), (37, None), (283, 85), (222, 107)),
    "files that are memory": system_call((319, 279), (323, 282), (447, 447)),
    "counters": system_call((298, 241)),
    "devices": system_call((16, 29), (72, 25), (32, 23), (33, None), (292, 24), (22, None), (293, 59)),
    "open by other doors": system_call((437, 437), (304, 265), (85, None), (76, None), (77, 46)),
    "identity": system_call((105, 146), (117, 147), (126, 91), (157, 167)),
    "undo the filter": system_call((317, 277), (157, 167)),
    "undo Landlock": system_call((444, 444), (445, 445), (446, 446)),
    "raise limits": tries("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "Error"),
    "raise priority": tries("import os\nos.nice(-10)"),
    "catch the kernel's last word": tries("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)", "Error"),
    "block signals": tries("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXCPU})", "Error"),
    "an alarm for later": tries("import signal\nsignal.setitimer(signal.ITIMER_REAL, 1)", "itimer_error"),
    "sleep": tries("import time\ntime.sleep(60)", "Error"),
    # --- out of Python, which works, to what is denied all the same ---
    "subclasses": tries("""
        for found in ().__class__.__base__.__subclasses__():
            if found.__name__ == "_wrap_close":
                found.__init__.__globals__["fork"]()
    """),
    "frame climb": tries("""
        def climb():
            yield walker.gi_frame.f_back.f_back
        walker = climb()
        frame = next(walker)
        import sys
        while frame.f_back:
            frame = frame.f_back
        frame.f_globals["os"].fork()
    """, "Error"),
    "traceback": tries("""
        try:
            1 / 0
        except ZeroDivisionError as error:
            frame = error.__traceback__.tb_frame
            while frame.f_back:
                frame = frame.f_back
            frame.f_globals["os"].fork()
    """),
    "attribute error": tries("""
        try:
            plan.missing
        except AttributeError as error:
            error.obj.__class__.kinds.__globals__["__builtins__"]["open"]("/etc/passwd")
    """),
    "format": tries("""
        if "function" in "{0.__class__.kinds}".format(plan):
            open("/etc/passwd")
    """),
    "a module's own modules": tries("""
        import dataclasses
        dataclasses.sys.modules["os"].fork()
    """, fence=True),
    "import by name": tries("__import__('os').fork()"),
    "eval": tries("eval(compile('__import__(\"os\").fork()', 'x', 'eval'))"),
    "unpickle": tries("""
        import pickle
        if pickle.loads(b"cposix\\nsystem\\n(S'true'\\ntR.") != 0:
            raise PermissionError
    """),
    "another library": tries("import orjson", "ModuleNotFoundError"),
    "a library put on the path": tries("import sys\nsys.path.insert(0, '/tmp')\nimport attack", "ModuleNotFoundError"),
    "foreign code": tries("import ctypes\nctypes.CDLL('/tmp/attack.so')", "OSError"),
    # --- numpy's own doors ---
    "numpy memmap": tries("import numpy\nnumpy.memmap('/etc/passwd')", fence=True),
    "numpy fromfile": tries("import numpy\nnumpy.fromfile('/etc/passwd')", fence=True),
    "numpy save": tries(
        "import numpy\nnumpy.save('/tmp/attack', plan)", fence=True
    ),
    "numpy load": tries("import numpy\nnumpy.load('/etc/passwd', allow_pickle=True)", fence=True),
    "numpy bomb": tries("import numpy\nnumpy.ones(1 << 40)", "MemoryError", fence=True),
    # --- memory ---
    "list bomb": tries("x = [0] * 10**12", "MemoryError", fence=True),
    "text bomb": tries("x = 'x' * 10**12", "MemoryError", fence=True),
    "doubling": tries("x = [1]\nwhile True:\n    x = sum([x, x], [])", "MemoryError", fence=True),
    "a list that grows": tries("x = []\nwhile True:\n    x.append(bytes(100000))", "MemoryError", fence=True),
    "mapped memory": tries("import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(100)]", "Error"),
    # --- answers ---
    "exit": tries("raise SystemExit", "SystemExit", fence=True),
    "keyboard": tries("raise KeyboardInterrupt", "KeyboardInterrupt", fence=True),
    "generator exit": tries("raise GeneratorExit", "GeneratorExit", fence=True),
    "recursion": tries("def f():\n    f()\nf()", "RecursionError", fence=True),
    "deep text": tries("compile('-' * 100000 + '1', 'x', 'eval')", "Error"),
    "nothing": Attack("return None", "schedule returned nothing; return a Plan", fence=True),
    "a number": Attack("return 7", "schedule returned a int; return a Plan", fence=True),
    "a dictionary": Attack("return {'groups': []}", "schedule returned a dict; return a Plan", fence=True),
    "not a number": Attack(
        "return Plan([ReplicaGroup('a', 'b', share=float('nan'))])", "ValueError: Out of range float", fence=True
    ),
    "a strange object in a plan": Attack(
        "return Plan([ReplicaGroup('a', 'b', share=object())])", "a object cannot be part of a plan", fence=True
    ),
    "no replicas": Attack(
        "return Plan([ReplicaGroup('a', 'b', replicas=-3)])", "no plan: .*replicas must be a whole number", fence=True
    ),
    "a plan without end": Attack(
        "plan = Plan()\nobject.__setattr__(plan, 'groups', [plan])\nreturn plan", "Error"
    ),
    "an error that cannot be told": Attack(
        "class E(Exception):\n    def __str__(self):\n        raise E\nraise E", r"It failed: line \d+: E$", fence=True
    ),
    "an error that tells too much": Attack("raise ValueError('x' * 10**7)", "^It failed: .{0,400}$", fence=True),
    "an error for the terminal": Attack(
        "raise ValueError(chr(27) + ']0;x' + chr(10) + chr(0))", r"^It failed: [ -~]*$", fence=True
    ),
}  # fmt: skip

ENDED: dict[str, Attack] = {
    "endless loop": Attack("while True:\n    pass", "not answer in time", fence=True, deadline_s=0.3),
    "endless loop that catches everything": Attack(
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "not answer in time", fence=True, deadline_s=0.3,
    ),
    "power": Attack("return 9 ** 9 ** 9", "not answer in time", fence=True, deadline_s=0.3),
    "long sum": Attack("return sum(range(10**12))", "not answer in time", fence=True, deadline_s=0.3),
    "comparing shared lists": Attack(
        "a, b = [], []\nfor _ in range(60):\n    a, b = [a, a], [b, b]\nreturn a == b",
        "not answer in time", fence=True, deadline_s=0.3,
    ),
    "slow pattern": Attack(
        "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "not answer in time", deadline_s=0.3
    ),
    "waiting": Attack(FIND_PIPES + "os.read(requests, 1)", "not answer in time", deadline_s=0.3),
    "leaving": Attack("import os\nos._exit(0)", "ended with code 0"),
    "leaving with an error": Attack("import os\nos._exit(7)", "ended with code 7"),
    "abort": Attack("import os\nos.abort()", "ended by signal"),
    "crash": Attack("import ctypes\nctypes.string_at(0)", "ended by signal SIGSEGV"),
    "a call of another ABI": Attack(
        "import ctypes\nctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 | 39))", "ended by signal SIGSYS",
    ),
    "a 32-bit call": Attack(
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        "page.write(bytes.fromhex('b814000000cd80c3'))  # mov eax, 20; int 0x80; ret\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(at)()",
        "ended by signal",
    ),
    "closing the pipe": Attack(FIND_PIPES + "os.close(answers)", "Its process ended"),
    "garbage": Attack(FIND_PIPES + "os.write(answers, bytes(range(256)) + b'\\n')", "not one JSON object"),
    "deep garbage": Attack(
        FIND_PIPES + "os.write(answers, b'[' * 60000 + b'\\n')", "not one JSON object",
    ),
    "a bare answer": Attack(FIND_PIPES + "os.write(answers, b'true\\n')", "not one JSON object"),
    "an answer without end": Attack(
        FIND_PIPES + "while True:\n    os.write(answers, b' ' * 65536)", "over 131072 bytes",
    ),
    "a huge answer": Attack(
        "return Plan([ReplicaGroup('x' * 10**7, 'b')])", "over 131072 bytes", fence=True
    ),
    "another answer first": Attack(
        FIND_PIPES + "os.write(answers, b'{\"sequence\": 1, \"answer\": {\"groups\": []}}\\n')\n"
        "while True:\n    pass",
        "not asked"
    ),
    "two answers": Attack(
        FIND_PIPES + "sequence = sys._getframe(1).f_locals['sequence']\n"
        "line = b'{\"sequence\": %d, \"answer\": {\"groups\": []}}\\n' % sequence\n"
        "os.write(answers, line + line)\nwhile True:\n    pass",
        "not one JSON object",
    ),
    "an answer of another kind": Attack(
        FIND_PIPES + "sequence = sys._getframe(1).f_locals['sequence']\n"
        "os.write(answers, b'{\"sequence\": %d, \"value\": 1}\\n' % sequence)\nwhile True:\n    pass",
        "lacks what was asked for",
    ),
}  # fmt: skip


def table():
    """The attacks as docs/sandbox.md shows them."""
    rows = ["| attack | as text | for real |", "| --- | --- | --- |"]
    for attacks, outcome in ((DENIED, "denied"), (ENDED, "process ended")):
        rows += [
            f"| {name} | {'passes' if attack.fence else 'refused'} | {outcome} |"
            for name, attack in attacks.items()
        ]
    return "\n".join(rows)
