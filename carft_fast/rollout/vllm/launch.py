"""vLLM server processes: the launcher that runs in them, and the handle that starts, watches and ends one.

`python -P -m carft_fast.rollout.vllm.launch PARENT_PID ARGUMENTS` runs vLLM's own API server, and ends it when the
process that started it is gone, even after a SIGKILL.
"""

import contextlib
import errno
import ipaddress
import os
import re
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from carft_fast.config import Config
from carft_fast.core import EngineError, InputError
from carft_fast.rollout.vllm import adapter
from carft_fast.rollout.vllm.adapter import LOOPBACK
from carft_fast.rollout.vllm.scratch import LONGEST_FOLDER, Scratch
from carft_fast.rollout.vllm.token import TOKEN, read_token

MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` itself asks for the version of a package named vllm

_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME|ROLE_RANK)$|MASTER_|TORCHELASTIC_|ACCELERATE_|FSDP_"
)
"""Variables by which `torchrun` and `accelerate launch` tell a trainer its rank and settings."""
_LISTEN = "0A"
"""The state in /proc/net/tcp."""


def server_environment(
    cuda_visible_devices: str | None, host: str, token: str, transfer: str, scratch: Path
) -> dict[str, str]:
    """Of the server process. What the user has set stays; what `adapter.prepare_environment` has set does not.

    vLLM's sockets between its own processes, and what else it puts into temporary folders, go to `scratch`.
    """
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that update weights
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    if transfer == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # its handles are sent pickled
    for name, value in os.environ.items():
        if not _LAUNCHER.match(name) and adapter.IN_PROCESS_ENVIRONMENT.get(name) != value:
            environment[name] = value
    if is_loopback(host):
        environment.setdefault("VLLM_HOST_IP", LOOPBACK)
    environment.pop(TOKEN, None)
    environment["VLLM_API_KEY"] = token
    environment["PYTHONSAFEPATH"] = "1"  # no process of the server imports from the working folder
    if len(str(scratch)) <= LONGEST_FOLDER:
        environment["TMPDIR"] = str(scratch)
    if cuda_visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = cuda_visible_devices
    return environment


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int) -> None:
    """Raises InputError when something listens there, or the host is no address of this machine."""
    if not host.strip():
        raise InputError(f"--host is {host!r}: give an address of this machine, such as {LOOPBACK}, ::1 or 0.0.0.0")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET  # as vLLM chooses it
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise InputError(f"--host {host}: {error.strerror}; allowed are this machine's addresses") from None
            raise InputError(f"port {port} on {host}: {error.strerror}; give another with --port") from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """One server on this machine, in its own process group; `log` gets what it prints."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._arguments, self.log, self._environment = arguments, log, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self.url = ""

    def start(self) -> None:
        """Stops a running process, then starts one on a free port. Returns at once: the server answers later."""
        self.stop()
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        address = ["--host", LOOPBACK, "--port", str(port)]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(os.getpid()), *self._arguments, *address],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                umask=0o077,
            )

    @property
    def listens(self) -> bool:
        """Whether this user's process has the port. Until it does another user's could take it, and get the token."""
        address = f"0100007F:{urlsplit(self.url).port:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return any(line[1] == address and line[3] == _LISTEN and int(line[7]) == os.getuid() for line in lines[1:])

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def failure(self) -> EngineError:
        """Why it ended, from the last error it printed."""
        printed = self.log.read_bytes()[self._log_start :].decode(errors="replace")
        found = re.findall(r"\w+Error: (.+)", printed)
        reason = next((text for text in reversed(found) if "root cause above" not in text), "it printed no error")
        return EngineError(f"{adapter.start_failure(RuntimeError(reason))}; the server's log is {self.log}")

    def stop(self) -> None:
        """SIGTERM to the group, SIGKILL to what is left of it when its leader has ended, at the latest after 5 s."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended
            for signum in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(self._process.pid, signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
        self._process = None


def _end_with(parent: int) -> None:
    """SIGTERM first: vLLM's processes then remove their shared memory."""
    while os.getppid() == parent:
        time.sleep(1)
    group = os.getpgid(0)
    subprocess.Popen(["/bin/sh", "-c", f"sleep 5; kill -KILL -{group}"], start_new_session=True)
    os.killpg(group, signal.SIGTERM)


def serve(config: Config, host: str, port: int) -> NoReturn:
    """Run a server for runs with this config until it or this process ends; it waits for a trainer's weights."""
    from carft_fast.models import load_lm_config, resolve_device

    given = read_token() or read_token("VLLM_API_KEY")
    check_port(host, port)
    device_type = resolve_device(config.model.device).type
    lm_config = load_lm_config(config.model)
    adapter.check_engine(config, lm_config, device_type)
    token = given or secrets.token_urlsafe(32)
    scratch = Scratch("carft-model-")
    folder = scratch.path / "model"
    adapter.write_model_folder(lm_config, folder)
    transfer = adapter.transfer_backend(config, device_type)
    arguments = adapter.server_arguments(adapter.engine_options(config, device_type, dedicated=True), folder, transfer)
    command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), *arguments]
    command += ["--host", host, "--port", str(port)]
    if not given:
        print(f"{TOKEN}={token}\nmade for this server, because none was set: set it where the trainer runs", flush=True)
    sys.exit(_relay(command, server_environment(None, host, token, transfer, scratch.path)))


def _relay(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server in a session of its own and print what it prints. SIGINT or SIGTERM ends it, with one line in place
    of what its processes say of that. Returns the exit status."""
    process: subprocess.Popen[bytes] | None = None
    ended_by: list[int] = []

    def kill(signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended
            if process is not None:
                os.killpg(process.pid, signum)

    def end(signum: int, _frame: object) -> None:
        kill(signal.SIGKILL if ended_by else signal.SIGTERM)
        ended_by.append(signum)
        impatient = threading.Timer(5, kill, [signal.SIGKILL])
        impatient.daemon = True
        impatient.start()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, end)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        umask=0o077,
    )
    if ended_by:
        kill(signal.SIGTERM)
    assert process.stdout is not None
    for line in process.stdout:  # until the last of its processes has ended
        if not ended_by:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    status = process.wait()
    if not ended_by:
        return status if status >= 0 else 128 - status
    print(f"stopped by {signal.Signals(ended_by[0]).name}", flush=True)
    return 128 + ended_by[0]


def main(arguments: Sequence[str]) -> None:
    threading.Thread(target=_end_with, args=(int(arguments[0]),), daemon=True).start()
    sys.argv = [MODULE, *arguments[1:]]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
