"""Chat templates, rendered in a process of their own. They are programs that come with a model, and Jinja's sandbox has
no bounds: a rendering that goes over its limit of processor time or memory ends the process, and the next starts
another.

The process: python -m carft_fast.data.chat; one JSON line in, one out.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CPU_SECONDS = 5.0
"""For the chats of one call."""
MEMORY_BYTES = 1 << 30
LONGEST = 1 << 22
"""Characters of a rendered text."""
TOGETHER = 64
"""Chats of one call; each crosses to the process and back."""
_WALL_PER_CPU = 10
_START_SECONDS = 120.0
_LONGEST_ERROR = 300
_ENVIRONMENT = ("PATH", "HOME", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH")
"""All that the process gets of ours."""

Chat = list[dict[str, str]]
"""Messages, each with a role and its content."""


class ChatRenderer:
    """Renders chat templates as transformers does. Threads may share it; a fork starts a process of its own."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, template: str, chats: Sequence[Chat], variables: dict[str, Any]) -> list[str]:
        """A text for each of at most TOGETHER chats. `variables`: what the template may read besides `messages` and
        `question`, the last user message. Raises ValueError, which says why it failed."""
        with self._turn:
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([template, chats, variables], default=str).encode() + b"\n")
                process.stdin.flush()
                line = self._reply(process, CPU_SECONDS * _WALL_PER_CPU)
            except BrokenPipeError:
                line = b""
            if not line:
                raise ValueError(self._ending(process))
        found = json.loads(line)
        if isinstance(found, str):
            raise ValueError(found)
        return list(found)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        package = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "carft_fast.data.chat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is the run's to handle
            )
            if self._reply(process, _START_SECONDS) != b"[]\n":
                process.kill()
                process.communicate()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                raise ValueError(f"the process that renders it did not start: {said[-1] if said else 'no reply'}")
        self._process, self._owner = process, os.getpid()
        return process

    @staticmethod
    def _reply(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """Its next line; empty when it ended or took too long."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else b""

    def _ending(self, process: subprocess.Popen[bytes]) -> str:
        """End the process; why it had to, or had by itself."""
        self._process = None
        slow = process.poll() is None and not self._reply(process, 0)
        process.kill()
        process.communicate()
        if slow or process.returncode == -signal.SIGPROF:
            return f"it takes more than {CPU_SECONDS:g} s for at most {TOGETHER} questions"
        return f"the process that renders it ended with {process.returncode}"


RENDERER = ChatRenderer()
"""This process's: starting one takes a second."""


def main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that is printed may pass for a reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("[]", file=replies, flush=True)
    for line in sys.stdin:
        template, chats, variables = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF, not handled: ends the process even inside C code
        try:
            texts: list[str] = []
            for chat in chats:
                question = next(message["content"] for message in reversed(chat) if message["role"] == "user")
                texts += render_jinja_template([chat], chat_template=template, question=question, **variables)[0]
            longest = max(map(len, texts))
            over = f"its text has {longest:,} characters, over {LONGEST:,}"
            reply = json.dumps(texts if longest <= LONGEST else over)
        except MemoryError:
            reply = json.dumps(f"it needs more than {MEMORY_BYTES >> 20:,} MiB of memory")
        except Exception as error:
            reply = json.dumps(f"{type(error).__name__}: {error}".partition("\n")[0][:_LONGEST_ERROR])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, file=replies, flush=True)


if __name__ == "__main__":
    main()
