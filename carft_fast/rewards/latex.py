"""LaTeX answers, compared in a process of its own. math-verify and sympy have no bounds, so each comparison has a limit
of processor time: one that exceeds it ends the process, and `LatexChecker` starts another.

The process: python -P -m carft_fast.rewards.latex SECONDS; one JSON line in, one word out.
"""

import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from carft_fast.core import RewardError
from carft_fast.rewards.answers import LatexVerdict, compare_latex

MEMORY_BYTES = 2 << 30
_WALL_PER_CPU = 10  # a comparison gets its processor time within this many times as long, on a busy machine too
_START_SECONDS = 120.0


class LatexChecker:
    """Compares LaTeX in a process (`main`) with limits of processor time and memory."""

    def __init__(self, cpu_seconds: float) -> None:
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def compare(self, answer: str, target: str) -> LatexVerdict:
        """Also "unreadable": what goes over the limits. Raises RewardError where the process cannot be used."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([answer, target]).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise RewardError("the process that compares LaTeX ended between two comparisons") from None
        match self._reply(process, self._cpu_seconds * _WALL_PER_CPU):
            case "same":
                return "same"
            case "different":
                return "different"
            case "":
                self.close()
        return "unreadable"

    def _start(self) -> subprocess.Popen[bytes]:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "carft_fast.rewards.latex", str(self._cpu_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is the run's to handle
            )
            if self._reply(self._process, _START_SECONDS) != "ready":
                self.close()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                raise RewardError(f"the process that compares LaTeX did not start: {said[-1] if said else 'no reply'}")
        return self._process

    @staticmethod
    def _reply(process: subprocess.Popen[bytes], seconds: float) -> str:
        """Its next line; empty when it ended or took too long."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline().decode().strip() if ready else ""

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main() -> None:
    seconds = float(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that is printed may pass for a reply
    logging.disable(logging.CRITICAL)
    compare_latex("(x+1)^2", "x^2+2x+1")  # imports everything before the clock runs
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, target = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF, not handled: ends the process even inside C code
        try:
            verdict = compare_latex(answer, target)
        except Exception:  # sympy raises many kinds on what it cannot take, MemoryError and RecursionError among them
            verdict = "unreadable"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=replies, flush=True)


if __name__ == "__main__":
    main()
