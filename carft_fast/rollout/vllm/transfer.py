"""How weights reach vLLM servers: through files, or from GPU to GPU with vLLM's own transfer engines.

`stage` takes the weights that the following `send` calls deliver. `send` returns the servers that failed: they are left
paused, their version incomplete. Both transfers leave a server's weight version at "incomplete" from the first byte to
the last, so that nothing sampled in between can be taken for a rollout.

With LoRA unmerged a `send` delivers the adapters, and the frozen weights to those servers alone that do not hold them.
"""

import asyncio
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from safetensors import SafetensorError
from safetensors.torch import save_file

from carft_fast.core import EngineError
from carft_fast.rollout.vllm import adapter
from carft_fast.rollout.vllm.adapter import Weights
from carft_fast.rollout.vllm.adapter_files import NAME
from carft_fast.rollout.vllm.http import ServerApi, ServerLost
from carft_fast.rollout.vllm.launch import free_port
from carft_fast.rollout.vllm.scratch import scratch_folder


async def _each(urls: Sequence[str], call: Callable[[str], Awaitable[None]]) -> dict[str, ServerLost]:
    """Call for all servers at once, and wait for all. Returns the lost servers, raises any other failure."""
    results = await asyncio.gather(*(call(url) for url in urls), return_exceptions=True)
    lost: dict[str, ServerLost] = {}
    for url, result in zip(urls, results, strict=True):
        if isinstance(result, ServerLost):
            lost[url] = result
        elif isinstance(result, BaseException):
            raise result
    return lost


async def _holds(api: ServerApi, url: str, weight_version: str) -> bool:
    """Whether the server holds an earlier version of the same run, whole."""
    return (await api.weight_version(url)).rpartition("-")[0] == weight_version.rpartition("-")[0]


async def _finish(api: ServerApi, url: str, adapters: Path | None, weight_version: str) -> None:
    if adapters is not None:
        await api.load_adapter(url, NAME, str(adapters))
    await api.close_update(url, weight_version)


class FileTransfer:
    """One safetensors file for each layer; only the current version's stay.

    The folder's name has the trainer's process id and machine, so that the next trainer there removes what a killed
    one left (in memory, under /dev/shm).
    """

    repeatable = True
    """Whether `send` may be called after the trainer's weights have changed: it sends what was staged."""

    def __init__(self, folder: str) -> None:
        self._folder = scratch_folder("carft-weights-", folder)
        self._version = ""
        self._adapters: Path | None = None
        self._files: list[Path] = []

    def stage(self, weights: Weights | None, weight_version: str, adapters: Path | None = None) -> None:
        """`weights` None: those staged before, which every server that has them keeps."""
        self._version, self._adapters = weight_version, adapters
        if weights is None:
            return
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

    async def send(self, api: ServerApi, urls: Sequence[str]) -> dict[str, ServerLost]:
        info = {"files": [str(path) for path in self._files]}

        async def one(url: str) -> None:
            frozen_there = self._adapters is not None and await _holds(api, url, self._version)
            await api.open_update(url)
            if not frozen_there:
                await api.start_update(url)
                await api.update(url, info)
                await api.finish_update(url)
            await _finish(api, url, self._adapters, self._version)

        return await _each(urls, one)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class DeviceTransfer:
    """vLLM's "nccl" (GPUs of other processes or machines) and "ipc" (one GPU, two processes). Never run on a GPU yet.

    One broadcast reaches every server. Another set of servers gets a new group.
    """

    @property
    def repeatable(self) -> bool:
        return self._adapters is not None  # frozen weights are still there

    def __init__(self, backend: Literal["nccl", "ipc"], update_timeout_s: float, token: str | None) -> None:
        self._backend, self._timeout_s, self._token = backend, update_timeout_s, token
        self._weights: Weights | None = None
        self._version = ""
        self._adapters: Path | None = None
        self._sender: Any = None
        self._members: tuple[str, ...] = ()
        self._one_at_a_time = threading.Lock()  # servers that come back at the same time each get a group

    def stage(self, weights: Weights | None, weight_version: str, adapters: Path | None = None) -> None:
        self._weights = self._weights if weights is None else weights
        self._version, self._adapters = weight_version, adapters

    async def send(self, api: ServerApi, urls: Sequence[str]) -> dict[str, ServerLost]:
        sizes: dict[str, int] = {}

        async def prepare(url: str) -> None:
            frozen_there = self._adapters is not None and await _holds(api, url, self._version)
            await api.open_update(url)
            if not frozen_there:
                sizes[url] = await api.world_size(url)

        lost = await _each(urls, prepare)
        ready = [url for url in urls if url not in lost]
        members = tuple(url for url in ready if url in sizes)
        if members:
            # In a thread: vLLM's sender blocks, and calls `_ControlPlane`, which runs its own event loop.
            await asyncio.to_thread(self._send, members, [sizes[url] for url in members])
        return lost | await _each(ready, lambda url: _finish(api, url, self._adapters, self._version))

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
        infos, offset = {}, 1
        for url, size in zip(self._urls, self._sizes, strict=True):
            infos[url] = init_info | ({"rank_offset": offset} if "rank_offset" in init_info else {})
            offset += size
        self._on_each(lambda api, url: api.init_transfer(url, infos[url]))

    def start_weight_update(self) -> None:
        self._on_each(ServerApi.start_update)

    def update_weights(self, update_info: Any) -> None:
        payload = adapter.http_payload(update_info)
        self._on_each(lambda api, url: api.update(url, payload))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._on_each(ServerApi.finish_update)

    def _on_each(self, call: Callable[[ServerApi, str], Awaitable[None]]) -> None:
        async def run() -> dict[str, ServerLost]:
            async with ServerApi.open(self._timeout_s, self._token) as api:
                return await _each(self._urls, lambda url: call(api, url))

        if lost := asyncio.run(run()):
            raise EngineError(f"weight transfer ({', '.join(self._urls)}): {next(iter(lost.values()))}")


def _address_towards(url: str) -> str:
    """This machine's address as the server sees it."""
    host = urlsplit(url).hostname or "127.0.0.1"
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
