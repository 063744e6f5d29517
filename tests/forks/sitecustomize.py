"""On a CPU vLLM begins each of a server's three processes anew, and each imports it again: 12 s of a processor. Here
the second and the third are forks of the first. One thread each, so OpenMP has none that a fork would lose.

Python imports this at its start, from PYTHONPATH.
"""

import multiprocessing
import sys

if "carft_fast.rollout.vllm.launch" in sys.orig_argv:
    get_context = multiprocessing.get_context

    def get_fork(method: str | None = None) -> object:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = get_fork  # type: ignore[assignment]
