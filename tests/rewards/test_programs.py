"""Programs that attack, each beside innocent ones; ordinary programs; and what is left when processes are killed.

Every attack is run twice: against the whole sandbox, and as root with all capabilities, no namespaces and the machine's
own root folder, where only the filter of system calls and the resource limits are left.
"""

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from carft_fast.core.errors import InputError
from carft_fast.rewards import programs as sandbox
from carft_fast.rewards.programs import Outcome, ProgramPool, SandboxError, read_result

INNOCENT = "def solution():\n    return 6 * 7"
FORBIDDEN = Outcome(None, "killed: forbidden system call")
SECRET = "a-secret-of-the-trainer"
CPU_SECONDS, WORKERS = 0.2, 2
WHOLE = ("system calls", "resource limits", "namespaces", "empty root", "unprivileged user")
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCONT)

# What solution() does; SECRET_FILE, CANARY, TRAINER and the ports are put in by the arena.
ATTACKS = {
    # processes and threads
    "fork bomb": "while True: os.fork()",
    "fork, ctypes": "while True: libc.fork()",
    "vfork, ctypes": "return libc.vfork()",
    "execve": "os.execve('/bin/sh', ['sh', '-c', 'touch CANARY'], {})",
    "posix_spawn": "return os.posix_spawn('/bin/sh', ['sh', '-c', 'touch CANARY'], {})",
    "os.system": "return os.system('touch CANARY')",
    "os.popen": "return os.popen('cat SECRET_FILE').read()",
    "subprocess": "import subprocess\nreturn subprocess.check_output(['cat', 'SECRET_FILE'], text=True)",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "daemon": "if libc.fork() == 0:\n    libc.setsid()\n    while True: pass",
    "thread": "import _thread\n_thread.start_new_thread(print, ())\nreturn 1",
    "threads, caught": (
        "import _thread\nwhile True:\n    try: _thread.start_new_thread(print, ())\n    except BaseException: pass"
    ),
    # time and memory
    "infinite loop": "while True: pass",
    "loop in C": "return sum(itertools.repeat(0))",
    "loop that catches all": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "signal handler": "signal.signal(signal.SIGPROF, lambda *_: None)\nwhile True: pass",
    "timer off": "signal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass",
    "signals blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: pass",
    "limits raised": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\nwhile True: pass",
    "limits raised, ctypes": "libc.setrlimit(0, b'\\xff' * 16)\nwhile True: pass",
    "sleep": "import time\ntime.sleep(3600)",
    "lock": "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()",
    "pause": "libc.pause()",
    "busy regex": "return bool(re.match(r'(a+)+$', 'a' * 64 + 'b'))",
    "memory, list": "return len([0] * 10**10)",
    "memory, doubling": "x = 'x'\nwhile True: x += x",
    "memory, slowly": "kept = []\nwhile True: kept.append(bytearray(1 << 16))",
    "memory, caught": (
        "kept = []\nwhile True:\n    try:\n        while True: kept.append(bytearray(1 << 20))\n"
        "    except MemoryError: pass"
    ),
    "memory, shared file": "return os.memfd_create('x')",
    "huge power": "return 9**9**9",
    "huge integer": "return 10**4000",
    "huge integer as text": "return str(10**6000)",
    "deep recursion": "def f(): return f()\nreturn f()",
    "deep recursion, no limit": (
        "sys.setrecursionlimit(1 << 30)\nclass A:\n    def __repr__(self): return repr(self)\nreturn repr(A())"
    ),
    "nested source": "return eval('(' * 5000 + ')' * 5000)",
    "nested evaluation": (
        "code = 'open(\"SECRET_FILE\")'\nfor _ in range(3): code = f'eval({code!r})'\nreturn eval(code).read()"
    ),
    # files
    "read secret": "return open('SECRET_FILE').read()",
    "read secret, os.open": "return os.read(os.open('SECRET_FILE', 0), 100).decode()",
    "read secret, io": "import io\nreturn io.FileIO('SECRET_FILE').read().decode()",
    "read secret, open call": "return libc.syscall(2, b'SECRET_FILE', 0) < 0 and 1 / 0",
    "read secret, x32 call": "return libc.syscall(0x40000002, b'SECRET_FILE', 0) < 0 and 1 / 0",
    "read secret, openat2": "return libc.syscall(437, -100, b'SECRET_FILE', bytes(24), 24) < 0 and 1 / 0",
    "read secret, io_uring": "return libc.syscall(425, 4, bytes(120)) < 0 and 1 / 0",
    "map secret": "import mmap\nreturn mmap.mmap(os.open('SECRET_FILE', 0), 0, prot=1).read().decode()",
    "map a descriptor": "return libc.mmap(None, 4096, 1, 1, 3, 0) == -1 and 1 / 0",
    "code of its own": "return libc.mmap(None, 4096, 7, 0x22, -1, 0) == -1 and 1 / 0",
    "passwd": "return open('/etc/passwd').read()",
    "environment of the trainer": "return open('/proc/TRAINER/environ').read()",
    "environment of its own": "return os.environ['CARFT_TEST_SECRET']",
    "memory of its own": "return open('/proc/self/mem', 'wb').write(b'x')",
    "descriptors": "return str(os.listdir('/proc/self/fd'))",
    "write": "open('CANARY', 'w').write('x')",
    "write, ctypes": "return libc.creat(b'CANARY', 0o644) < 0 and 1 / 0",
    "write to shared memory": "open('/dev/shm/CANARY_NAME', 'w').write('x')",
    "write to the working folder": "open('CANARY_NAME', 'w').write('x')",
    "kernel log": "open('/dev/kmsg', 'w').write('SECRET')",
    "listing": "return str(os.listdir('/'))",
    "unlink": "os.unlink('SECRET_FILE')",
    "rmdir": "os.rmdir('EMPTY_FOLDER')",
    "chmod": "os.chmod('SECRET_FILE', 0)",
    "symlink": "os.symlink('SECRET_FILE', 'CANARY')",
    "rename": "os.rename('SECRET_FILE', 'CANARY')",
    "mount": "return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) and 1 / 0",
    "chroot": "os.chroot('/tmp')",
    # network
    "tcp": "import _socket\ns = _socket.socket()\ns.connect(('127.0.0.1', TCP_PORT))",
    "udp": "return libc.socket(2, 2, 0) < 0 and 1 / 0",
    "unix socket": "return libc.socket(1, 1, 0) < 0 and 1 / 0",
    "socket pair": "return libc.socketpair(1, 1, 0, bytes(8)) and 1 / 0",
    # other processes
    "signal to the trainer": "os.kill(TRAINER, signal.SIGUSR1)",
    "signal to all": "os.kill(-1, signal.SIGTERM)",
    "signal to the group": "os.killpg(0, signal.SIGTERM)",
    "signal to the parent": "os.kill(os.getppid(), signal.SIGKILL)",
    "ptrace": "return libc.ptrace(16, TRAINER, 0, 0) and 1 / 0",
    "memory of the trainer": "return libc.process_vm_readv(TRAINER, None, 0, None, 0, 0) and 1 / 0",
    "prctl": "return libc.prctl(1, 0, 0, 0, 0) and 1 / 0",
    # the interpreter
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "code object": "f = lambda: 0\nf.__code__ = f.__code__.replace(co_code=b'd\\xff' * 40)\nreturn f()",
    "sys.exit": "sys.exit(0)",
    "os._exit": "os._exit(0)",
    "os._exit, 3": "os._exit(3)",
    "abort": "os.abort()",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "exception of its own": "class E(BaseException):\n    def __str__(self): raise self\nraise E",
    "subclasses": (
        "for c in ().__class__.__base__.__subclasses__():\n"
        "    if c.__name__ == '_wrap_close':\n        return c.__init__.__globals__['popen']('cat SECRET_FILE').read()"
    ),
    "builtins": "return __builtins__['open']('SECRET_FILE').read()",
    "format string": "return '{0.__globals__[__builtins__][open]}'.format(solution) and open('SECRET_FILE').read()",
    "frame walk": (
        "frame = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\nreturn frame.f_globals['socket'].socket()"
    ),
    "finder": (
        "import importlib.machinery as m\nsys.meta_path.append(m.PathFinder)\nsys.path.append('/usr/lib/python3')\n"
        "import antigravity"
    ),
    "metaclass": (
        "class M(type):\n    def __instancecheck__(c, o): return True\n"
        "    def __getattribute__(c, n): raise SystemExit\nclass A(metaclass=M): pass\nreturn A()"
    ),
    "class that lies": (
        "class A:\n    @property\n    def __class__(self): return float\n    def __float__(self): os.fork()\nreturn A()"
    ),
    "float that attacks": "class F(float):\n    def __float__(self): return open('SECRET_FILE').read()\nreturn F(1)",
    "not a number": "return float('nan')",
    "infinite": "return float('inf')",
    "wrong signature": "return solution(1)",
    "nothing": "return None",
    "list": "return [42]",
    # output
    "gigabytes printed": "while True: print('x' * (1 << 20))",
    "gigabytes returned": "return 'x' * (1 << 20)",
    "garbage on every descriptor": "for fd in [3, *range(64)]: os.write(fd, b'f\\xff\\xff')",
    "garbage as the result": "os.write(3, b'\\x80\\x04pickle' * 9)\nos._exit(0)",
    "forged result, then its own": "os.write(3, b'f' + bytes(8))\nreturn 2",
    "flooded result": "while True: os.write(3, b'f' * 4096)",
    "result pipe closed": "os.close(3)",
    "result pipe copied": "os.dup(3)",
}
# What comes back from those that do themselves no good and get a value: it is theirs alone.
HARMLESS: dict[str, tuple[str, object]] = {
    "stdout deleted": ("del sys.stdout, sys.stderr, sys.__stdout__\nreturn 5", 5.0),
    "printing": ("print('x' * 1000, flush=True)\nreturn 5", 5.0),
    "forged result": ("import struct\nos.write(3, b'f' + struct.pack('<d', 41))\nos._exit(0)", 41.0),
    "atexit": ("import atexit\natexit.register(open, 'CANARY', 'w')\nreturn 5", 5.0),
    "del": ("class A:\n    def __del__(self): open('CANARY', 'w')\nA()\nreturn 5", 5.0),
    "equal to all": ("class F(float):\n    def __eq__(self, other): return True\nreturn F(5)", 5.0),
    "float that lies": ("class F(float):\n    def __float__(self): return 6.0\nreturn F(5)", 6.0),
    "harness patched": ("sys._getframe(1).f_globals['struct'].pack = lambda *_: bytes(8)\nreturn 5", 0.0),
    "builtins patched": ("import builtins\nbuiltins.isinstance = lambda *_: True\nreturn 1", True),
    "SystemExit caught": ("try: sys.exit(1)\nexcept SystemExit: return 5", 5.0),
    "environment": ("return ' '.join(sorted(os.environ))", "PYTHONCOERCECLOCALE PYTHONHASHSEED PYTHONUTF8 TZ"),
    "objects": (
        "import gc\nreturn any('SEC' + 'RET_TEXT' in str(o) for o in gc.get_objects() if isinstance(o, str))",
        False,
    ),
    "memory, mapped": ("return libc.mmap(None, ctypes.c_size_t(1 << 40), 3, 0x22, -1, 0)", -1.0),
    "input": ("try: input()\nexcept EOFError: return 5", 5.0),
}
PREFIX = "import ctypes, itertools, os, re, signal, sys\nlibc = ctypes.CDLL(None)\n\ndef solution():\n"


def program(body: str) -> str:
    return PREFIX + textwrap.indent(body, "    ")


def processes() -> set[int]:
    """Those of every pool of this process: forks keep the command line, whatever else they change."""
    ours = f'"trainer": {os.getpid()},'.encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if b"sandbox_server.py" in command and ours in command:
                found.add(int(folder.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


class Arena:
    """What attacks aim at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret, self.empty = folder / "secret.txt", folder / "empty"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o644)
        self.empty.mkdir()
        self.canary = folder / f"carft-canary-{os.getpid()}"
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.signals: list[int] = []

    def aim(self, text: str) -> str:
        for name, value in (
            ("SECRET_FILE", self.secret),
            ("EMPTY_FOLDER", self.empty),
            ("CANARY_NAME", self.canary.name),
            ("CANARY", self.canary),
            ("TRAINER", os.getpid()),
            ("TCP_PORT", self.tcp.getsockname()[1]),
        ):
            text = text.replace(name, str(value))
        return text

    def check_untouched(self) -> None:
        assert self.secret.read_text() == SECRET
        assert self.secret.stat().st_mode & 0o777 == 0o644
        assert sorted(self.folder.iterdir()) == [self.empty, self.secret]
        for folder in (Path("/"), Path("/dev/shm"), Path("/tmp"), Path.cwd()):
            assert not (folder / self.canary.name).exists()
        assert not select.select([self.tcp], [], [], 0)[0]
        assert self.signals == []


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    found = Arena(tmp_path)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)  # so that it is not the folder that protects the secret
    before = {signum: signal.signal(signum, lambda number, _: found.signals.append(number)) for signum in SIGNALS}
    yield found
    for signum, handler in before.items():
        signal.signal(signum, handler)
    found.tcp.close()


def bare_server(folder: Path) -> Path:
    """The server without its second line: it stays root, with its capabilities, in the machine's own namespaces."""
    source = Path(sandbox._SERVER).read_text()
    for old, new in (
        ("libc.unshare(", "print("),
        ("if user == 0:", "if user == -1:"),
        ('check(libc.syscall(architecture.calls["capset"],', 'print((architecture.calls["capset"],'),
    ):
        assert old in source
        source = source.replace(old, new)
    path = folder / "sandbox_server.py"
    path.write_text(source)
    return path


@pytest.fixture(scope="module", params=["whole", "system calls alone"])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProgramPool]:
    os.environ["CARFT_TEST_SECRET"] = SECRET
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "system calls alone":
            patch.setattr(sandbox, "_SERVER", bare_server(tmp_path_factory.mktemp("bare")))
        with ProgramPool(WORKERS, cpu_seconds=CPU_SECONDS, wall_seconds=20, memory_mb=128) as found:
            if request.param == "system calls alone" and os.geteuid() == 0:
                assert found.defences == WHOLE[:2]
            elif wanted := os.environ.get("CARFT_TEST_DEFENCES"):  # by test_sandbox_machines.py
                assert ", ".join(found.defences) == wanted
            yield found
    del os.environ["CARFT_TEST_SECRET"]
    assert wait_for(lambda: not processes())


@pytest.mark.parametrize("name", [*ATTACKS, *HARMLESS])
def test_attack(name: str, pool: ProgramPool, arena: Arena) -> None:
    body, wanted = (ATTACKS[name], None) if name in ATTACKS else HARMLESS[name]
    attack = arena.aim(program(body))
    before, outcome, *after = pool.run([INNOCENT, attack, INNOCENT, INNOCENT])
    assert {before, *after} == {Outcome(42.0, None)}
    assert pool.run([INNOCENT] * 3) == [Outcome(42.0, None)] * 3
    assert outcome.value == wanted
    assert type(outcome.value) is type(wanted)
    assert bool(outcome.error) == (wanted is None)
    assert SECRET not in str(outcome)
    assert "ZeroDivisionError" not in str(outcome.error)  # how an attack says that a call came back
    arena.check_untouched()
    assert wait_for(lambda: len(processes()) == 3 * WORKERS), "a process is left, or one is missing"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("while True: pass", f"timed out after {CPU_SECONDS:g} s of CPU"),
        ("return bytearray(1 << 30)", "memory"),
        ("return 'x' * (1 << 20)", "output"),
        ("os.getppid()", "killed: forbidden system call"),
        ("open('/etc/passwd')", "PermissionError: [Errno 13] Permission denied: '/etc/passwd'"),
        ("import ctypes\nctypes.string_at(0)", "killed: SIGSEGV"),
        ("os._exit(0)", "ended without a result"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("raise ValueError('\\x1b[2J\\nfine')", "ValueError:  [2J fine"),
        ("return 10**400", "OverflowError: int too large to convert to float"),
        ("return None", "solution() returned nothing"),
        ("return [1]", "solution() returned list"),
        ("return 1j", "solution() returned complex"),
    ],
)
def test_errors_say_why(pool: ProgramPool, body: str, error: str) -> None:
    assert pool.run([program(body)]) == [Outcome(None, error)]


def test_programs_that_are_none(pool: ProgramPool) -> None:
    syntax, empty, other, null, long, surrogate = pool.run(
        ["def solution(:", "", "solution = 3", "\0", "#" * 70_000, INNOCENT + "\n# \ud800"]
    )
    assert syntax == Outcome(None, "SyntaxError: invalid syntax (<program>, line 1)")
    assert empty == other == Outcome(None, "no function solution()")
    assert null.value is None
    assert "null byte" in (null.error or "")
    assert long == Outcome(None, "a program of 70000 bytes, over 65536")
    assert surrogate == Outcome(42.0, None)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("import math\nreturn math.sqrt(2)", math.sqrt(2)),
        ("from fractions import Fraction\nreturn Fraction(1, 4)", 0.25),
        ("from decimal import Decimal\nreturn Decimal('0.1') * 3", 0.3),
        ("import statistics\nreturn statistics.median([1, 5, 9])", 5.0),
        ("from datetime import date, datetime\nreturn (date(2024, 3, 1) - date(2024, 2, 1)).days", 29.0),
        ("from datetime import datetime\nreturn datetime.strptime('1 March 2024', '%d %B %Y').month", 3.0),
        ("from datetime import datetime\nreturn datetime.now().strftime('%Y') > '2000'", True),
        ("import collections, functools\nreturn functools.reduce(max, collections.Counter('aab').values())", 2.0),
        ("import string, re\nreturn re.sub('[^a-z]', '', string.ascii_letters)", "abcdefghijklmnopqrstuvwxyz"),
        ("import numbers\nreturn isinstance(1, numbers.Integral)", True),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 4\nreturn A().x", 4.0),
        ("import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()\nreturn 1", 1.0),
        ("return 'é'.encode('latin-1').decode('latin-1')", "é"),
        ("return True", True),
        ("return -7", -7.0),
    ],
)
def test_ordinary_values(pool: ProgramPool, body: str, value: float | str | bool) -> None:
    assert pool.run([program(body)]) == [Outcome(value, None)]


def test_the_same_text_gives_the_same_outcome() -> None:
    """Whatever worker runs it, before or after others, in this pool or in another one."""
    text = program("import random\nreturn f\"{random.random()} {list({'a', 'b', 'c'})}\"")
    change = program("import random\nrandom.seed(1)\nreturn random.random()")
    with ProgramPool(2) as one, ProgramPool(1) as other:
        found = one.run([text, change] * 4)[::2] + other.run([change, text])[1:]
    assert len({outcome.value for outcome in found}) == 1


def test_annotated_programs(shared_data: Callable[[str], Path]) -> None:
    """Each returns its row's answer within the reward's tolerance, in order."""
    rows = json.loads(shared_data("svamp_python_sdp.json").read_text())[::10]
    with ProgramPool(2) as pool:
        outcomes = pool.run([row["answer_cot"] for row in rows])
    assert [outcome.error for outcome in outcomes] == [None] * len(rows)
    for row, outcome in zip(rows, outcomes, strict=True):
        assert isinstance(outcome.value, float)
        assert abs(outcome.value - float(row["answer_value"])) <= 1e-2, row["item_id"]


def test_wall_clock_ends_what_processor_time_does_not() -> None:
    with ProgramPool(1, cpu_seconds=60, wall_seconds=0.5) as pool:
        assert pool.run([program("while True: pass"), INNOCENT]) == [
            Outcome(None, "timed out after 0.5 s"),
            Outcome(42.0, None),
        ]


@pytest.mark.parametrize("victim", ["launcher", "server"])
def test_a_killed_server_costs_one_outcome(victim: str) -> None:
    """The program in flight scores an error; the others do not notice."""
    others = processes()
    with ProgramPool(2, cpu_seconds=5) as pool:
        launcher = pool._workers[0]._process.pid
        target = launcher if victim == "launcher" else children(launcher)[0]
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -9 {target}"])
        stuck = program("import time\nend = time.time() + 1.5\nwhile time.time() < end: pass\nreturn 1")
        found = pool.run([stuck, *[INNOCENT] * 50])
        assert killer.wait() == 0
        assert found == [Outcome(None, "the server of this program ended"), *[Outcome(42.0, None)] * 50]
        assert pool.run([INNOCENT] * 4) == [Outcome(42.0, None)] * 4
    assert wait_for(lambda: not processes() - others)


def test_a_server_killed_between_runs_costs_nothing() -> None:
    others = processes()
    with ProgramPool(1) as pool:
        pool._workers[0]._process.kill()
        pool._workers[0]._process.wait()
        assert wait_for(lambda: not processes() - others)
        assert pool.run([INNOCENT] * 2) == [Outcome(42.0, None)] * 2


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def test_nothing_outlives_a_killed_trainer() -> None:
    """Not even with a copy of its descriptors in another process, a data loader's worker say."""
    code = (
        "import os, sys, time\nfrom carft_fast.rewards.programs import ProgramPool\n"
        "pool = ProgramPool(1, cpu_seconds=50)\n"
        "if os.fork() == 0: time.sleep(8); os._exit(0)\n"
        "print('ready', flush=True)\npool.run(['def solution():\\n while True: pass'])"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert trainer.stdout is not None
    try:
        assert trainer.stdout.readline() == b"ready\n"
        launcher = [
            pid for pid in children(trainer.pid) if b"sandbox_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        server = children(launcher[0])
        program_ids = children(server[0])
        assert len(launcher) == len(server) == len(program_ids) == 1
        trainer.kill()
        trainer.wait()
        gone = [*launcher, *server, *program_ids]
        assert wait_for(lambda: not any(running(pid) for pid in gone), seconds=6)
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)
        trainer.stdout.close()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_closed_pool_refuses() -> None:
    with ProgramPool(1) as pool:
        pass
    with pytest.raises(SandboxError, match="closed"):
        pool.run([INNOCENT])


def test_a_kernel_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server whose filter is not installed gives the forbidden program its answer, and is not used."""
    others = processes()
    source = Path(sandbox._SERVER).read_text()
    install = "check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(FILTER), 0, 0))"
    assert install in source
    server = tmp_path / "sandbox_server.py"
    server.write_text(source.replace(install, "pass"))
    monkeypatch.setattr(sandbox, "_SERVER", server)
    with pytest.raises(SandboxError, match="failed its self-test on this machine"):
        ProgramPool(1)
    assert wait_for(lambda: not processes() - others)


def test_bad_settings_and_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ({"workers": 0}, {"cpu_seconds": math.nan}, {"memory_mb": 8}, {"output_bytes": 1 << 20}):
        with pytest.raises(InputError, match=next(iter(setting))):
            ProgramPool(**setting)  # type: ignore[arg-type]
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(InputError, match="x86_64 or aarch64 only; this is linux on riscv64"):
        ProgramPool()


@pytest.mark.parametrize(
    "payload",
    [b"", b"f", b"f" + b"1" * 7, b"f" + b"1" * 9, b"f" + b"\xff" * 8, b"b\2", b"b", b"s\xff", b"x", b"\x80\x04."],
)
def test_garbage_is_never_a_value(payload: bytes) -> None:
    outcome = read_result(payload)
    assert outcome.value is None
    assert outcome.error
