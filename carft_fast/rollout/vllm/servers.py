"""Engine "vllm-server": one or more vLLM servers; each prompt goes to the next server that has room.

A prompt belongs to one server at a time, and is done when its answer is here. When a server fails, the others get its
prompts. It samples again only after it has loaded the current weights, and an answer from any other weights is not
accepted. So a rollout is never lost, doubled, or of unknown weights.
"""

import asyncio
import contextlib
import secrets
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carft_fast.config import Config
from carft_fast.core import EngineError, InputError
from carft_fast.models import CarftModel, WeightUpdate
from carft_fast.rollout.base import Progress, Prompts, Rollout, SamplingParams, check_request
from carft_fast.rollout.vllm import adapter
from carft_fast.rollout.vllm.adapter_files import NAME, AdapterFiles
from carft_fast.rollout.vllm.http import ServerApi, ServerLost
from carft_fast.rollout.vllm.launch import ServerProcess, server_environment
from carft_fast.rollout.vllm.scratch import Scratch
from carft_fast.rollout.vllm.token import read_token
from carft_fast.rollout.vllm.transfer import DeviceTransfer, FileTransfer

MENDS = 3
"""Times a server that fails is brought back during one `generate`; a fourth failure is no accident."""
PROGRESS_SECONDS = 5.0
WATCH_SECONDS = 5.0


@dataclass(eq=False)
class _Server:
    """A server and what is known of it. `process` is None for one that somebody else started, at `address`."""

    process: ServerProcess | None
    address: str = ""
    usable: bool = False
    """It answers and holds the current weights."""
    answered: bool = False
    """Since its process started. One that never did is still starting; one that did and stopped hangs."""
    checked: bool = False
    """It picks tokens by the rule. This run's own do: they run `CoupledWorker`."""

    @property
    def url(self) -> str:
        return self.process.url if self.process else self.address


class VLLMServerEngine:
    """Starts its servers, or uses those of `rollout.servers`; all hold random weights until the first `sync`."""

    def __init__(
        self, config: Config, model: CarftModel, ends: Sequence[int], *, folder: Path | None, log: Callable[[str], None]
    ) -> None:
        rollout = config.rollout
        self._config, self._ends, self._log = rollout, ends, log
        self._context = config.data.max_length
        self._dtype = adapter.engine_dtype(config)
        self._run = ""  # tells this run's weights from those that another trainer left on a server
        self._staged = False  # the weights of `_model`, the frozen ones where LoRA is sent unmerged
        self.version = -1
        self._whole = False
        backend = adapter.transfer_backend(config, model.device.type)
        # Other users of this machine can reach the servers of the run, so these always ask for a token.
        self._token = read_token() or ("" if rollout.servers else secrets.token_urlsafe(32))
        self._transfer = (
            FileTransfer(rollout.transfer_dir)
            if backend == "files"
            else DeviceTransfer(backend, rollout.server_timeout_s, self._token)
        )
        by_adapters = adapter.sends_adapters(config, model.device.type)
        self._adapters = AdapterFiles(rollout.transfer_dir) if by_adapters else None
        self._model: Callable[[], CarftModel | None] = lambda: None
        self._scratch = Scratch("carft-servers-")
        self._servers = [_Server(None, url.rstrip("/")) for url in rollout.servers]
        try:
            if not self._servers:
                model_folder = self._scratch.path / "model"
                adapter.write_model_folder(model.lm.config, model_folder)
                options = adapter.engine_options(config, model.device.type, dedicated=bool(rollout.server_devices))
                arguments = adapter.server_arguments(options, model_folder, backend)
                logs = folder or Path(tempfile.mkdtemp(prefix="carft-logs-"))
                for index, devices in enumerate(rollout.server_devices or [None]):
                    environment = server_environment(
                        devices, adapter.LOOPBACK, self._token, backend, self._scratch.path
                    )
                    process = ServerProcess(arguments, logs / f"vllm-server-{index}.log", environment)
                    process.start()
                    self._servers.append(_Server(process))
            asyncio.run(self._start())
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the servers this run started."""
        return [server.process.pid for server in self._servers if server.process and server.process.pid]

    def sync(self, model: CarftModel, update: WeightUpdate | None = None) -> int:
        """`update`: what to send, where this process has only a part of the model."""
        self._whole = False
        if self._model() is not model:
            self._model, self._run, self._staged = weakref.ref(model), secrets.token_hex(4), False
        if update is None:
            unmerged = self._adapters is not None
            update = WeightUpdate.of(model.lm, self._dtype, unmerged=unmerged, frozen=not self._staged)
        tag, files = self._tag(self.version + 1), None
        if self._adapters and update.adapters is not None:
            files = self._adapters.write(model.lm, update.adapters, tag)
        self._transfer.stage(update.weights, tag, files)
        self._staged = True
        self.version += 1
        asyncio.run(self._sync())
        self._whole = True
        return self.version

    def generate(
        self, prompts: Prompts, sampling: SamplingParams, *, on_progress: Progress | None = None
    ) -> list[Rollout]:
        check_request(prompts, sampling, context=self._context, weights_whole=self._whole)
        # A request for each completion: vLLM counts drafts only so. The prefix cache shares the prompt's prefill.
        bodies = []
        for index, prompt in enumerate(prompts):
            fields = adapter.sampling_fields(sampling, index, self._ends)
            for sample in range(sampling.samples_per_prompt):
                bodies.append(self._body(prompt, fields | {"n": 1, "seed": fields["seed"] + sample}))
        found = asyncio.run(self._generate(bodies, on_progress or (lambda _: None)))
        return [found[index] for index in range(len(bodies))]

    def close(self) -> None:
        for server in self._servers:
            if server.process:
                server.process.stop()
        self._servers = []
        self._transfer.close()
        if self._adapters:
            self._adapters.close()
        self._scratch.close()

    def _tag(self, version: int) -> str:
        return f"{self._run}-{version}"

    def _check_version(self, *found: str) -> None:
        if set(found) != {self._tag(self.version)}:
            raise ServerLost(f"it holds the weights {sorted(set(found))}, not {self._tag(self.version)}")

    async def _start(self) -> None:
        async with ServerApi.open(self._config.server_timeout_s, self._token) as api:
            await asyncio.gather(*(self._wait_healthy(api, server) for server in self._servers))
            for server in self._servers:
                length = await api.context_length(server.url)
                if length < self._context:
                    raise InputError(
                        f"the server at {server.url} takes {length} tokens; data.max_length is {self._context}: start "
                        "it with the run's config"
                    )

    async def _healthy(self, api: ServerApi, server: _Server) -> bool:
        return (server.process is None or server.process.listens) and await api.healthy(server.url)

    async def _wait_healthy(self, api: ServerApi, server: _Server) -> None:
        """Until the server answers. Raises EngineError when it ends or takes longer than allowed."""
        limit_s = self._config.server_timeout_s
        start = last_line = time.monotonic()
        while not await self._healthy(api, server):
            now = time.monotonic()
            if server.process and not server.process.running:
                raise server.process.failure()
            if now - start > limit_s:
                detail = f"see {server.process.log}" if server.process else "is it running?"
                raise EngineError(
                    f"the vLLM server at {server.url} did not answer in {limit_s:g} s (rollout.server_timeout_s): "
                    f"{detail}"
                )
            if now - last_line >= PROGRESS_SECONDS:
                last_line = now
                self._log(f"waiting for the vLLM server at {server.url}: {now - start:.0f} of at most {limit_s:g} s")
            await asyncio.sleep(0.2)
        server.answered = True

    async def _sync(self) -> None:
        """Staged weights to every server that answers; the others get them while the next prompts are sampled."""
        async with ServerApi.open(self._config.server_timeout_s, self._token) as api:
            for server in self._servers:
                server.usable = False
            ready = await asyncio.gather(*(self._answers(api, server) for server in self._servers))
            present = [server for server, answers in zip(self._servers, ready, strict=True) if answers]
            if not present:
                await asyncio.gather(*(self._wait_healthy(api, server) for server in self._servers))
                present = self._servers
            for server in self._servers:
                if server not in present:
                    self._log(f"the vLLM server at {server.url} does not answer; it gets the weights when it does")
            lost = await self._transfer.send(api, [server.url for server in present])
            for server in present:
                server.usable = server.url not in lost
                if server.url in lost:
                    self._log(f"the vLLM server at {server.url} did not take the weights: {lost[server.url]}")
                elif server.process is None and not server.checked:
                    await self._check_rule(api, server)
        if not any(server.usable for server in self._servers):
            raise EngineError(f"no vLLM server took the weights: {_reasons(lost)}")

    async def _check_rule(self, api: ServerApi, server: _Server) -> None:
        """Raises InputError where a server samples by another rule: this one knows nothing of `allowed_token_ids`."""
        fields = adapter.sampling_fields(SamplingParams(1), 0, self._ends)
        bodies = [self._body([0], fields | {"allowed_token_ids": [token]}) for token in (0, 1)]
        try:
            found = [(await self._complete(api, server.url, body)).completion_ids for body in bodies]
        except ServerLost as failure:
            server.usable = False
            self._log(f"the vLLM server at {server.url} failed ({failure})")
            return
        if found == [[0], [1]]:
            raise InputError(
                f"the server at {server.url} samples by vLLM's own rule: start it with `carft-fast serve`, or with the "
                "--worker-cls of docs/multi_node.md"
            )
        server.checked = True

    def _body(self, prompt: Sequence[int], fields: dict[str, Any]) -> dict[str, Any]:
        named = {"model": NAME} if self._adapters else {}
        return {"token_ids": list(prompt), "sampling_params": fields, **named}

    async def _answers(self, api: ServerApi, server: _Server) -> bool:
        """Starts this run's server again when it ended, or answered once and does not now."""
        ended = server.process is not None and not server.process.running
        if not ended and await self._healthy(api, server):
            server.answered = True
            return True
        if server.process and (ended or server.answered):
            self._log(f"starting the vLLM server at {server.url} again; its log is {server.process.log}")
            server.process.start()
            server.answered = False
        return False

    async def _generate(self, bodies: Sequence[dict[str, Any]], on_progress: Progress) -> dict[int, Rollout]:
        found: dict[int, Rollout] = {}
        waiting: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(bodies)):
            waiting.put_nowait(index)
        lost: dict[str, ServerLost] = {}
        changed = asyncio.Event()
        # Enough to keep the engine's batch full, few enough that a faster server takes over the rest.
        at_once = min(len(bodies), max(2, -(-5 * self._config.batch_size // 4)))

        async def work(url: str) -> None:
            while True:
                index = await waiting.get()
                try:
                    found[index] = await self._complete(api, url, bodies[index])
                except BaseException:
                    waiting.put_nowait(index)
                    raise
                changed.set()

        async def watch(url: str) -> None:
            """Notices a server that another trainer has paused, or that hangs: its answers would never come."""
            while True:
                self._check_version(await api.weight_version(url))
                await asyncio.sleep(WATCH_SECONDS)

        async def employ(server: _Server) -> None:
            """Give the server prompts until it is lost."""
            tasks = [asyncio.create_task(work(server.url)) for _ in range(at_once)]
            tasks.append(asyncio.create_task(watch(server.url)))
            try:
                await asyncio.gather(*tasks)
            except ServerLost as failure:
                server.usable = False
                lost[server.url] = failure
                self._log(f"the vLLM server at {server.url} failed ({failure}); its prompts wait for another")
            finally:
                await _cancel(tasks)

        async def drive(server: _Server) -> None:
            """Employ a server and bring it back when it is lost, until that fails or it has been lost too often."""
            for _ in range(MENDS + 1):
                if not server.usable:
                    if self._config.async_depth and not self._transfer.repeatable:
                        return  # the trainer's weights have changed: the next sync brings it back
                    try:
                        await self._bring_back(api, server)
                    except Exception as failure:
                        self._log(str(failure))
                        return
                if server.usable:
                    await employ(server)

        async with ServerApi.open(self._config.server_timeout_s, self._token) as api:
            drivers = [asyncio.create_task(drive(server)) for server in self._servers]
            reported = 0
            try:
                while len(found) < len(bodies):
                    for driver in drivers:
                        if driver.done():
                            driver.result()
                    if all(driver.done() for driver in drivers):
                        raise EngineError(f"no vLLM server is left: {_reasons(lost)}")
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), 0.1)
                    changed.clear()
                    on_progress(len(found) - reported)
                    reported = len(found)
                on_progress(len(found) - reported)
            finally:
                await _cancel(drivers)
        return found

    async def _bring_back(self, api: ServerApi, server: _Server) -> None:
        """Wait for a server, start it again if it has to be, and send it the weights."""
        await self._answers(api, server)
        await self._wait_healthy(api, server)
        if lost := await self._transfer.send(api, [server.url]):
            self._log(f"a vLLM server did not come back: {_reasons(lost)}")
            return
        self._log(f"the vLLM server at {server.url} is back, with the current weights")
        server.usable = True

    async def _complete(self, api: ServerApi, url: str, body: dict[str, Any]) -> Rollout:
        choice, counted = await api.generate(url, body, self._config.request_timeout_s)
        self._check_version(*(span["version"] for span in choice["weight_versions"]))
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        return adapter.to_rollout(
            choice["token_ids"],
            logprobs,
            choice["finish_reason"],
            self._ends,
            self.version,
            counted.get("speculative_decoding"),
        )


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _reasons(lost: dict[str, ServerLost]) -> str:
    return "; ".join(f"{url}: {reason}" for url, reason in lost.items())
