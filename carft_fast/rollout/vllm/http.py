"""A vLLM server over HTTP: health, token-in token-out generation, and the phases of a weight update."""

import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from carft_fast.core import EngineError
from carft_fast.rollout.vllm.adapter import INCOMPLETE
from carft_fast.rollout.vllm.token import TOKEN, bearer

HINT = "start it with `carft-fast serve`, which sets the flags it needs"
ENGINE_S = 30.0
"""Seconds within which an engine answers, after the sampling step it is in."""


class ServerLost(Exception):  # noqa: N818 - an event the caller handles
    """The server did not answer, failed, or holds other weights than expected: another server can do the work."""


class ServerApi:
    """Calls to any number of servers; use inside `async with ServerApi.open(...)`."""

    def __init__(self, session: aiohttp.ClientSession, update_timeout_s: float) -> None:
        self._session = session
        self._update_timeout_s = update_timeout_s

    @staticmethod
    @asynccontextmanager
    async def open(update_timeout_s: float, token: str | None) -> AsyncIterator["ServerApi"]:
        """Connections are not limited: the caller chooses how many requests are under way.

        No connection is used twice. A server closes one after an error or five idle seconds, and a request sent on
        it at that moment would look like a lost server.
        """
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, headers=bearer(token)) as session:
            yield ServerApi(session, update_timeout_s)

    async def call(
        self, url: str, path: str, body: dict[str, Any] | None = None, *, method: str = "POST", timeout_s: float
    ) -> Any:
        """JSON of the answer. Raises ServerLost where another try may help, EngineError where the request is wrong."""
        text = await self._send(url, path, body, method=method, timeout_s=timeout_s)
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise EngineError(f"the server at {url} answered {path} with {text[:80]!r}: {HINT}") from None

    async def _send(self, url: str, path: str, body: dict[str, Any] | None, *, method: str, timeout_s: float) -> str:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            # A server redirects nobody; another one would get the prompts.
            async with self._session.request(
                method, url + path, json=body, timeout=timeout, allow_redirects=False
            ) as response:
                text = await response.text()
                status = response.status
        except TimeoutError:
            raise ServerLost(f"no answer to {path} in {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(f"{path}: {error or type(error).__name__}") from None
        if status >= 500:
            raise ServerLost(f"{path}: HTTP {status}: {_message(text)}")
        if status == 401:
            raise EngineError(
                f"the server at {url} wants the token it was started with in the environment variable {TOKEN}"
                if "Authorization" not in self._session.headers
                else f"the server at {url} was started with another token than that in {TOKEN}"
            )
        if status in (403, 404):
            raise EngineError(f"the server at {url} has no {path} ({_message(text)}): {HINT}")
        if status >= 300:
            raise EngineError(f"the server at {url} refused {path}: {_message(text)}")
        return text

    async def healthy(self, url: str) -> bool:
        """Whether the server answers within five seconds, and its engine, which may be at work, within `ENGINE_S`."""
        try:
            await self.call(url, "/health", method="GET", timeout_s=5)
            await self.weight_version(url)
        except ServerLost:
            return False
        return True

    async def context_length(self, url: str) -> int:
        """Tokens of prompt and completion together."""
        return int(await self._ask(url, "/v1/models", "data", 0, "max_model_len"))

    async def world_size(self, url: str) -> int:
        """GPUs (workers) of the server."""
        return int(await self._ask(url, "/get_world_size", "world_size"))

    async def weight_version(self, url: str) -> str:
        """As the engine itself says it; a server whose engine hangs answers everything else."""
        return str(await self._ask(url, "/weight_info", "weight_version"))

    async def _ask(self, url: str, path: str, *keys: str | int) -> Any:
        """The value in the answer that the keys lead to."""
        found = await self.call(url, path, method="GET", timeout_s=ENGINE_S)
        try:
            for key in keys:
                found = found[key]
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"the server at {url} answered {path} without {keys[-1]}: {HINT}") from None
        return found

    async def generate(self, url: str, body: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """The completion, and what the server measured of it."""
        answer = await self.call(url, "/inference/v1/generate", body, timeout_s=timeout_s)
        return answer["choices"][0], answer.get("metrics") or {}

    async def open_update(self, url: str) -> None:
        """Stop sampling, and mark the weights as incomplete until `close_update`."""
        await self._update(url, "/pause?mode=abort")
        await self._update(url, "/update_weight_version", new_version=INCOMPLETE)

    async def init_transfer(self, url: str, info: dict[str, Any]) -> None:
        await self._update(url, "/init_weight_transfer_engine", init_info=info)

    async def start_update(self, url: str) -> None:
        try:
            await self._update(url, "/start_weight_update")
        except ServerLost:
            # A trainer that died in the middle of an update left it open: end it, then begin again.
            with contextlib.suppress(ServerLost):
                await self.finish_update(url)
            await self._update(url, "/start_weight_update")

    async def update(self, url: str, info: Any) -> None:
        await self._update(url, "/update_weights", update_info=info)

    async def load_adapter(self, url: str, name: str, folder: str) -> None:
        """LoRA adapters from a peft folder that the server sees; in place of those of that name."""
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        await self._send(url, "/v1/load_lora_adapter", body, method="POST", timeout_s=self._update_timeout_s)

    async def finish_update(self, url: str) -> None:
        await self._update(url, "/finish_weight_update")

    async def close_update(self, url: str, weight_version: str) -> None:
        """Drop the cached prefixes of the old weights, name the new weights, sample again."""
        if not (await self._update(url, "/reset_prefix_cache"))["success"]:
            raise ServerLost("the prefix cache could not be reset: requests were still running")
        await self._update(url, "/update_weight_version", new_version=weight_version)
        await self._update(url, "/resume")

    async def _update(self, url: str, path: str, **body: Any) -> Any:
        return await self.call(url, path, body or None, timeout_s=self._update_timeout_s)


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200] or "no text"
