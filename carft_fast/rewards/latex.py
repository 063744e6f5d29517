"""A process that compares LaTeX, one JSON line for another. Its processor time per comparison is limited, since
neither math-verify nor sympy is bounded: what goes over ends the process, and `grading.LatexChecker` starts another.

Use: python -m carft_fast.rewards.latex SECONDS
"""

import json
import logging
import os
import resource
import signal
import sys

from carft_fast.rewards.answers import compare_latex

MEMORY_BYTES = 2 << 30


def main() -> None:
    seconds = float(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that is printed may pass for a reply
    logging.disable(logging.CRITICAL)
    compare_latex("1", "1")  # imports everything before the clock runs
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
