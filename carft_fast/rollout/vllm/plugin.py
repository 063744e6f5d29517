"""What vLLM's own processes load: a weight-transfer backend that reads safetensors files, and who is let in.

vLLM's built-in backends need GPUs. This one serves CPU servers, and any server that shares a folder with the trainer.
It is registered through the entry point `vllm.general_plugins`, so a server knows it without importing the trainer.
"""

import contextlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from carft_fast.core import InputError
from carft_fast.models import WeightInfo
from carft_fast.rollout.vllm.token import bearer, read_token

BACKEND = "carft_files"
SERVER_NAMES = "CARFT_SERVER_NAMES"
"""Environment variable with further names by which trainers reach a server, with commas or spaces between."""


@dataclass
class FilesUpdateInfo(WeightTransferUpdateInfo):
    files: list[str]
    """Paths of safetensors files that together hold every weight, in the order to load them."""


class FilesWeightTransferEngine(WeightTransferEngine[WeightTransferInitInfo, FilesUpdateInfo]):
    """Everything happens in `update_weights`: a trainer that dies before or after it leaves a usable model."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = FilesUpdateInfo
    _in_place: Any = None

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None: ...
    def start_weight_update(self) -> None: ...
    def finish_weight_update(self) -> None: ...
    def shutdown(self) -> None: ...

    def update_weights(self, update_info: dict[str, list[str]]) -> None:
        # The base class synchronises the accelerator afterwards, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FilesUpdateInfo) -> None:
        from carft_fast.rollout.vllm.in_place import InPlace  # plugins are loaded before vLLM's models

        if self._in_place is None:
            self._in_place = InPlace(self.model, self.vllm_config, self._reload)
        weights = list(_read(update_info.files))  # mapped, not read
        metadata = [WeightInfo(name, tuple(tensor.shape)) for name, tensor in weights]
        self._in_place.load(metadata, weights[0][1].dtype, weights)

    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        load_weights: Any = self.model.load_weights  # of vLLM's models, not of nn.Module
        initialize_layerwise_reload(self.model)
        load_weights(weights)
        finalize_layerwise_reload(self.model, self.model_config)


ROUTES = frozenset(
    {
        *("/health", "/metrics", "/v1/models", "/weight_info", "/get_world_size", "/inference/v1/generate"),
        *("/pause", "/resume", "/update_weight_version", "/reset_prefix_cache"),
        *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
        "/v1/load_lora_adapter",
    }
)
"""What a trainer calls, and figures. /collective_rpc is not among them: no worker method is called over HTTP."""


class Gate:
    """Lets a request through that names this server in its Host header, has the token, and asks for one of ROUTES.

    The token is VLLM_API_KEY; a server without one does not start. /health needs none. vLLM's own check lets through
    the routes that replace weights and call into the workers. The Host header tells a request to this server from one
    of a web page whose own name was pointed to this machine (DNS rebinding).
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        token = read_token("VLLM_API_KEY")
        if token is None:
            raise InputError("VLLM_API_KEY is not set: a server needs a token")
        self._expected = bearer(token)["Authorization"].encode()
        machine = socket.gethostname().lower()
        others = os.environ.get(SERVER_NAMES, "").lower().replace(",", " ").split()
        self._names = {"localhost", machine, machine.partition(".")[0], *others}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and (refusal := self._refusal(scope)):
            message, status = refusal
            return await JSONResponse({"error": {"message": message}}, status)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _refusal(self, scope: Any) -> tuple[str, int] | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_named(hosts[0]):
            return f"no name of this server: {', '.join(hosts)[:80]!r}; others than its own go into {SERVER_NAMES}", 421
        if scope["path"] != "/health":
            if not hmac.compare_digest(headers.get("authorization", "").encode(), self._expected):
                return "no valid token", 401
            if scope["path"] not in ROUTES:
                return "a trainer does not need this route", 404
        return None

    def _is_named(self, host: str) -> bool:
        """An IP address is nobody's name: only whoever knows the address gets here with it."""
        name = None
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname
            ipaddress.ip_address(name or "")
            return True
        return name in self._names


def _read(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        yield from load_file(path).items()


def register() -> None:
    """Entry point; vLLM may call it more than once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FilesWeightTransferEngine)
