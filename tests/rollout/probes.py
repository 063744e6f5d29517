"""What tests ask of servers that run: their addresses, their answers, their processes."""

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from carft_fast.rollout.vllm.servers import VLLMServerEngine
from carft_fast.rollout.vllm.token import TOKEN, bearer


def fetch(url: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> str:
    """With the servers' token, unless told otherwise."""
    shown = bearer(os.environ[TOKEN]) if headers is None else headers
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} | shown)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def urls(engine: VLLMServerEngine) -> list[str]:
    return [server.url for server in engine._servers]


def processes(group: int) -> Iterator[Path]:
    """Of a process group, in /proc."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                yield process
