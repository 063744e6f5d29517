"""How weights reach vLLM servers: through files, or from GPU to GPU with vLLM's own transfer engines.

Both leave a server's weight version at "incomplete" from the first byte to the last, so that nothing sampled in
between can be taken for a rollout.
"""

import asyncio
import os
import platform
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from safetensors import SafetensorError
from safetensors.torch import save_file

from carft_fast.core import EngineError
from carft_fast.models import HeldWeights, SamplerWeights
from carft_fast.rollout.vllm import adapter
from carft_fast.rollout.vllm.http import ServerApi, ServerLost, all_of
from carft_fast.rollout.vllm.launch import free_port

_PREFIX = "carft-weights-"


async def _each(urls: Sequence[str], call: Callable[[str], Awaitable[None]]) -> dict[str, ServerLost]:
    """Call for every server together; returns what was lost, raises any other failure."""
    results = await asyncio.gather(*(call(url) for url in urls), return_exceptions=True)
    lost: dict[str, ServerLost] = {}
    for url, result in zip(urls, results, strict=True):
        if isinstance(result, ServerLost):
            lost[url] = result
        elif isinstance(result, BaseException):
            raise result
    return lost


class Transfer(Protocol):
    repeatable: bool
    """Whether `send` may be called after the trainer's weights have moved on: it sends what was staged."""

    def stage(self, weights: SamplerWeights | HeldWeights, weight_version: str) -> None:
        """Take the weights that the following `send` calls deliver."""
        ...

    async def send(self, api: ServerApi, urls: Sequence[str]) -> dict[str, ServerLost]:
        """Deliver to these servers; returns those that failed. They are left paused, their version incomplete."""
        ...

    def close(self) -> None: ...


class FileTransfer:
    """One safetensors file for each layer; only the current version's stay.

    The folder's name has the trainer's process id and machine, so that what a killed one left (in memory, under
    /dev/shm) is removed by the next trainer there.
    """

    repeatable = True

    def __init__(self, folder: str) -> None:
        root = Path(folder) if folder else Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
        root = root or Path(tempfile.gettempdir())
        machine = platform.node()
        own = re.compile(rf"{_PREFIX}(\d+)-{re.escape(machine)}-[^-]+")
        for left in root.glob(f"{_PREFIX}*"):
            if (found := own.fullmatch(left.name)) and not Path(f"/proc/{found[1]}").exists():
                shutil.rmtree(left, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-{machine}-", dir=root))
        self._version = ""
        self._files: list[Path] = []

    def stage(self, weights: SamplerWeights | HeldWeights, weight_version: str) -> None:
        for path in self._files:  # first: under /dev/shm two versions would be twice the memory
            path.unlink(missing_ok=True)
        self._files = []
        for index, group in enumerate(weights.groups()):
            path = self._folder / f"{weight_version}-{index:05d}.safetensors"
            self._files.append(path)
            try:
                save_file({name: tensor.contiguous() for name, tensor in group}, path)
            except (OSError, SafetensorError) as error:
                raise EngineError(
                    f"the weights could not be written to {path.parent} ({error}): set rollout.transfer_dir to a "
                    "folder with room for them"
                ) from None
        self._version = weight_version

    async def send(self, api: ServerApi, urls: Sequence[str]) -> dict[str, ServerLost]:
        info = {"files": [str(path) for path in self._files]}

        async def one(url: str) -> None:
            await api.open_update(url)
            await api.start_update(url)
            await api.update(url, info)
            await api.finish_update(url)
            await api.close_update(url, self._version)

        return await _each(urls, one)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class DeviceTransfer:
    """vLLM's "nccl" (GPUs of other processes or machines) and "ipc" (one GPU, two processes). Never run on a GPU yet.

    One broadcast reaches every server. The group is made anew when the servers change.
    """

    repeatable = False

    def __init__(self, backend: Literal["nccl", "ipc"], update_timeout_s: float, token: str | None) -> None:
        self._backend, self._timeout_s, self._token = backend, update_timeout_s, token
        self._weights: SamplerWeights | HeldWeights | None = None
        self._version = ""
        self._sender: Any = None
        self._members: tuple[str, ...] = ()
        self._one_at_a_time = threading.Lock()  # servers that come back together each get a group

    def stage(self, weights: SamplerWeights | HeldWeights, weight_version: str) -> None:
        self._weights, self._version = weights, weight_version

    async def send(self, api: ServerApi, urls: Sequence[str]) -> dict[str, ServerLost]:
        assert self._weights is not None
        lost = await _each(urls, api.open_update)
        members = tuple(url for url in urls if url not in lost)
        if members:
            sizes = [await api.world_size(url) for url in members]
            # In a thread: vLLM's sender blocks, and calls `_ControlPlane`, which runs a loop of its own.
            await asyncio.to_thread(self._send, members, sizes)
            lost |= await _each(members, lambda url: api.close_update(url, self._version))
        return lost

    def _send(self, urls: tuple[str, ...], sizes: Sequence[int]) -> None:
        assert self._weights is not None
        with self._one_at_a_time:
            try:
                if urls != self._members:
                    self.close()
                    self._sender = adapter.device_sender(
                        self._backend,
                        _ControlPlane(urls, sizes, self._timeout_s, self._token),
                        self._weights,
                        address=_address_towards(urls[0]),
                        port=free_port(),
                        world_size=1 + sum(sizes),
                    )
                    self._members = urls
                self._sender.source = adapter.transfer_source(self._weights)
                self._sender.send_weights()
            except Exception:
                self.close()  # a broken group cannot be used again
                raise

    def close(self) -> None:
        if self._sender is not None:
            self._sender.shutdown()
        self._sender, self._members = None, ()


class _ControlPlane:
    """vLLM's `VLLMWeightSyncClient` over several servers at once; each takes the ranks after the one before."""

    def __init__(self, urls: Sequence[str], sizes: Sequence[int], timeout_s: float, token: str | None) -> None:
        self._urls, self._sizes, self._timeout_s, self._token = urls, sizes, timeout_s, token

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos, offset = [], 1
        for size in self._sizes:
            infos.append(init_info | ({"rank_offset": offset} if "rank_offset" in init_info else {}))
            offset += size
        self._all(lambda api: [api.init_transfer(u, info) for u, info in zip(self._urls, infos, strict=True)])

    def start_weight_update(self) -> None:
        self._all(lambda api: [api.start_update(url) for url in self._urls])

    def update_weights(self, update_info: Any) -> None:
        payload = adapter.http_payload(update_info)
        self._all(lambda api: [api.update(url, payload) for url in self._urls])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(lambda api: [api.finish_update(url) for url in self._urls])

    def _all(self, calls: Any) -> None:
        async def run() -> None:
            async with ServerApi.open(self._timeout_s, self._token) as api:
                await all_of(*calls(api))

        try:
            asyncio.run(run())
        except ServerLost as lost:
            raise EngineError(f"weight transfer ({', '.join(self._urls)}): {lost}") from None


def _address_towards(url: str) -> str:
    """This machine's address as the server sees it."""
    host = urlsplit(url).hostname or "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def build_transfer(
    backend: Literal["nccl", "ipc", "files"], folder: str, update_timeout_s: float, token: str | None
) -> Transfer:
    """`backend` as `adapter.transfer_backend` gives it, `token` as the servers ask for it."""
    return FileTransfer(folder) if backend == "files" else DeviceTransfer(backend, update_timeout_s, token)
