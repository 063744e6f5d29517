"""The hostile side of `carft_fast.rewards.programs`: a fork server, run as a script in an interpreter of its own.

A worker has three processes: this one, which gives up its privileges and then waits; the server, its child, which
forks; and a child of the server for each program. A child is forked before its program arrives and reads the program
itself. So the server never holds a byte of any, and every program starts from the same memory. This file imports the
standard library alone, nothing of carft_fast.

Lines of defence, outermost first: user, namespaces and an empty root where the kernel permits, resource limits, no
descriptor but the result pipe, and an allow-list of system calls, which no program runs without.
"""

import codecs
import contextlib
import ctypes
import decimal
import errno
import fcntl
import fractions
import gc
import importlib
import importlib.machinery
import io
import json
import linecache
import math
import os
import platform
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
import types
import typing
import warnings
from pathlib import Path
from typing import NoReturn

# Modules for the programs, which can read nothing from disk; datetime imports _strptime at its first use.
FOR_PROGRAMS = (
    *(
        "__future__",
        "_strptime",
        "abc",
        "array",
        "bisect",
        "calendar",
        "cmath",
        "collections.abc",
        "copy",
        "dataclasses",
        "enum",
    ),
    *("functools", "heapq", "itertools", "numbers", "operator", "re", "statistics", "string", "textwrap"),
    "unicodedata",
)
for module in FOR_PROGRAMS:
    importlib.import_module(module)

RESULT = 3  # the only descriptor a program has
NOFILE = 32
STACK_BYTES = 8 << 20
NOBODY = 65534
LONGEST_ERROR = 300  # characters

# prctl(2), unshare(2), mount(2), capset(2)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 4, 22, 38, 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE, MNT_DETACH = 1, 2, 4, 8, 0x4000, 0x40000, 2
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
libc.syscall.argtypes = [ctypes.c_long] * 3
libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]


# Name -> number on x86_64 and on aarch64; None where there is no such call
CALLS: dict[str, tuple[int | None, int | None]] = {
    "write": (1, 64),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "capset": (126, 91),
    "pivot_root": (155, 41),
    "time": (201, None),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "exit_group": (231, 94),
    "openat": (257, 56),
    "getrandom": (318, 278),
}


class Architecture(typing.NamedTuple):
    audit: int
    """What seccomp reports as the architecture of a call made in this ABI."""
    calls: dict[str, int]


ARCHITECTURES = {
    "x86_64": Architecture(0xC000003E, {name: x86 for name, (x86, _) in CALLS.items() if x86 is not None}),
    "aarch64": Architecture(0xC00000B7, {name: arm for name, (_, arm) in CALLS.items() if arm is not None}),
}
# Nothing here waits: there is no sleep, and a lock that is taken twice is a forbidden futex call.
CLOCK_CALLS = ("clock_gettime", "clock_getres", "gettimeofday", "time")
PLAIN_CALLS = ("brk", "munmap", "mremap", "getrandom", *CLOCK_CALLS, "exit", "exit_group")


def check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def call_filter(architecture: Architecture) -> bytes:
    """BPF program of the allow-list: a `struct sock_filter` an instruction (linux/filter.h, linux/seccomp.h)."""
    load, equal, at_least, any_bit, mask, give = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, kill = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x80000000)
    refuse = (give, 0, 0, 0x00050000 | errno.EACCES)

    def argument(n: int) -> tuple[int, int, int, int]:
        return load, 0, 0, 16 + 8 * n  # its low word: both architectures are little-endian

    def only_if_equal(*values: int) -> list[tuple[int, int, int, int]]:
        return [step for value in values for step in ((equal, 0, 1, value), allow)] + [kill]

    no_code = [argument(2), (any_bit, 0, 1, 0x4), kill]  # PROT_EXEC
    conditions = {
        "openat": [refuse],  # not killed for: to quote the line of a SyntaxError the parser tries to open its file
        "write": [argument(0), *only_if_equal(RESULT)],
        "mprotect": [*no_code, allow],
        # MAP_PRIVATE | MAP_ANONYMOUS, with or without MAP_NORESERVE
        "mmap": [*no_code, argument(3), (mask, 0, 0, 0xFFFFFFFF ^ 0x4000), *only_if_equal(0x22)],
        "madvise": [argument(2), *only_if_equal(4, 8)],  # MADV_DONTNEED, MADV_FREE
    }
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture.audit),
        kill,
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # x32
        kill,
    ]
    for name, steps in ({name: [allow] for name in PLAIN_CALLS} | conditions).items():
        if name in architecture.calls:
            program += [(equal, 0, len(steps), architecture.calls[name]), *steps]
    return b"".join(struct.pack("<HBBI", *step) for step in [*program, kill])


def limit(kind: int, value: int) -> None:
    """Soft and hard, never above what this process may have."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def give_up_privileges(memory_bytes: int, architecture: Architecture) -> list[str]:
    """Leave everything a program has no use for. Returns the lines of defence that are up."""
    active = ["system calls", "resource limits"]
    Path("/proc/self/oom_score_adj").write_text("1000")  # when memory runs out, these go before the trainer
    user, group = os.geteuid(), os.getegid()
    spaces = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    if libc.unshare(spaces) == 0:
        active.append("namespaces")
    elif libc.unshare(spaces | CLONE_NEWUSER) == 0:
        active.append("namespaces")
        with contextlib.suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
    if "namespaces" in active:
        with contextlib.suppress(OSError):
            enter_empty_root(architecture)
            active.append("empty root")
    for kind in ("CORE", "FSIZE", "MEMLOCK", "MSGQUEUE"):
        limit(getattr(resource, f"RLIMIT_{kind}"), 0)
    limit(resource.RLIMIT_NOFILE, NOFILE)
    limit(resource.RLIMIT_STACK, STACK_BYTES)
    limit(resource.RLIMIT_AS, memory_bytes)
    if user == 0:
        with contextlib.suppress(PermissionError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    if os.geteuid() != 0:
        active.append("unprivileged user")
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    check(libc.syscall(architecture.calls["capset"], ctypes.addressof(header), ctypes.addressof(nothing)))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    return active


def enter_empty_root(architecture: Architecture) -> None:
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, b"size=4k,mode=555"))
    os.chdir("/tmp")
    here = ctypes.create_string_buffer(b".")
    check(libc.syscall(architecture.calls["pivot_root"], ctypes.addressof(here), ctypes.addressof(here)))
    check(libc.umount2(here, MNT_DETACH))
    os.chdir("/")


class Discard(io.TextIOBase):
    """What programs print goes nowhere."""

    def write(self, text: str) -> int:
        return len(text)


def prepare_interpreter() -> None:
    """Everything a program may do without a system call that it is not allowed, and the same in every process."""
    for name in ("ascii", "latin-1", "utf-8", "utf-16", "unicode-escape"):
        codecs.lookup(name)
    time.tzset()
    warnings.simplefilter("ignore")
    linecache.updatecache = lambda *_: []  # sources of traceback lines are files
    sys.stdin = sys.__stdin__ = io.StringIO()  # type: ignore[misc, assignment]
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = Discard()  # type: ignore[misc, assignment]
    # What is not imported by now does not exist: an ordinary ModuleNotFoundError instead of a forbidden call.
    sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter]
    sys.path.clear()
    sys.path_importer_cache.clear()
    del sys.argv[1:]


def evaluate(text: str) -> bytes:
    """Run a program: its packed value, or why there is none."""
    try:
        module = types.ModuleType("program")
        sys.modules["program"] = module  # dataclasses look their module up
        exec(compile(text, "<program>", "exec", dont_inherit=True), vars(module))
        solution = vars(module).get("solution")
        return pack(solution()) if callable(solution) else b"eno function solution()"
    except MemoryError:
        return b"ememory"
    except BaseException as error:
        return b"e" + describe(error).encode("utf-8", "replace")


def pack(value: object) -> bytes:
    """A kind and its bytes; `carft_fast.rewards.programs` reads them. A number is a double, or else a quotient."""
    if isinstance(value, bool):
        return b"b" + bytes([value])
    if isinstance(value, (int, float, fractions.Fraction, decimal.Decimal)):
        number = float(value)
        if not math.isfinite(number):
            return b"enot a finite number"
        if isinstance(value, float) or (number == value and abs(number) < 2**53):
            return b"f" + struct.pack("<d", number)
        return b"q%d/%d" % fractions.Fraction(value).as_integer_ratio()
    if isinstance(value, str):
        return b"s" + value.encode("utf-8", "replace")
    return b"esolution() returned " + (b"nothing" if value is None else type(value).__name__.encode("utf-8", "replace"))


def describe(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:
        text = ""
    return (f"{name}: {text}" if text else name)[:LONGEST_ERROR]


def run_program(channel: socket.socket, write_end: int, server: int, options: dict[str, float]) -> NoReturn:
    """A child: waits for a program, shuts itself in, runs it. Until then it may fail, and nothing was run."""
    os.setsid()
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != server:
        os._exit(1)
    random.seed(0)  # a fork has seeded it from the kernel
    os.dup2(write_end, RESULT)
    limit(resource.RLIMIT_NPROC, 0)
    limit(resource.RLIMIT_CPU, math.ceil(options["cpu_seconds"]) + 1)  # the timer is finer; this is its second
    text = channel.recv(int(options["program_bytes"]) + 1)
    if not text:
        os._exit(0)
    os.closerange(0, RESULT)
    os.closerange(RESULT + 1, NOFILE)
    limit(resource.RLIMIT_NOFILE, 0)
    signal.setitimer(signal.ITIMER_PROF, options["cpu_seconds"])
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(FILTER), 0, 0))
    os.write(RESULT, b"+")  # from here on the program counts as run
    result = memoryview(evaluate(text[1:].decode()))
    while result:
        result = result[os.write(RESULT, result) :]
    os._exit(0)


def serve(channel: socket.socket, options: dict[str, float]) -> None:
    """One program after the other, until the trainer's end of the channel closes."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    server = os.getpid()
    output_bytes = int(options["output_bytes"])
    reply = memoryview(bytearray(output_bytes + 2))
    gc.collect()
    gc.freeze()
    while True:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                run_program(channel, write_end, server, options)
            finally:
                os._exit(1)
        os.close(write_end)
        if not os.readv(read_end, [reply[:1]]):  # without a "+" no program was run
            return
        size, problem = read_result(read_end, reply[1:], output_bytes, time.monotonic() + options["wall_seconds"])
        os.close(read_end)
        if problem:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        if not problem:
            problem = ending(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, options["cpu_seconds"])
        elif problem == "time":
            problem = f"timed out after {options['wall_seconds']:g} s"
        if problem:
            channel.send(b"E" + problem.encode())
        else:
            reply[0] = ord("R")
            channel.send(reply[: 1 + size])
        reply[: 1 + size] = bytes(1 + size)


def read_result(read_end: int, reply: memoryview, output_bytes: int, deadline: float) -> tuple[int, str]:
    """Bytes read until the child ended, and what it has to be killed for."""
    ready = select.poll()
    ready.register(read_end, select.POLLIN)
    size = 0
    while ready.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
        read = os.readv(read_end, [reply[size:]])
        size += read
        if size > output_bytes:
            return size, "output"
        if read == 0:
            return size, ""
    return size, "time"


def ending(exit_code: int, cpu_seconds: float, allowed: float) -> str:
    """What is wrong with how a child ended."""
    if exit_code == -signal.SIGSYS:
        return "killed: forbidden system call"
    if exit_code == -signal.SIGPROF or (exit_code == -signal.SIGKILL and cpu_seconds >= allowed):
        return f"timed out after {allowed:g} s of CPU"
    if exit_code < 0:
        return f"killed: {signal.Signals(-exit_code).name}"
    return f"exited with {exit_code}" if exit_code else ""


def main() -> None:
    options = json.loads(sys.argv[1])
    trainer, descriptor = int(options["trainer"]), int(options["channel"])
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError):  # those the C library keeps
            signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGCHLD})
    channel = socket.socket(fileno=fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, RESULT + 1))
    os.close(descriptor)
    try:
        prepare_interpreter()  # the last that reads files
        active = give_up_privileges(int(options["memory_bytes"]), ARCHITECTURES[platform.machine()])
        server = os.fork()
    except Exception:
        channel.send(b"E" + traceback.format_exc().encode()[-4000:])
        raise
    if server == 0:
        try:
            channel.send(b"+" + "\n".join(active).encode())
            serve(channel, options)
        finally:
            os._exit(0)
    channel.close()
    # The server ends with this process (PDEATHSIG), and this one with the trainer: a copy of the trainer's end of the
    # channel in another process would keep the server waiting. The signal would not do here: it follows the thread.
    while os.waitpid(server, os.WNOHANG) == (0, 0) and os.getppid() == trainer:
        signal.sigtimedwait({signal.SIGCHLD}, 1.0)


if __name__ == "__main__":
    code = call_filter(ARCHITECTURES[platform.machine()])
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a length and a pointer
    FILTER = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions)))
    main()
