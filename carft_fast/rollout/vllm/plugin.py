"""What vLLM's own processes load: a weight-transfer backend that reads safetensors files, and the check of the token.

vLLM's built-in backends need GPUs. This one serves CPU servers, and any server that shares a folder with the trainer.
It is registered through the entry point `vllm.general_plugins`, so a server knows it without importing the trainer.
"""

import hmac
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from carft_fast.models import WeightInfo

BACKEND = "carft_files"


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


class RequireToken:
    """Where VLLM_API_KEY is set, every request but /health needs it as a bearer token.

    vLLM's own check lets through the routes that replace weights and call into the workers.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ.get('VLLM_API_KEY', '')}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"] != "/health" and self._expected != b"Bearer ":
            given = Headers(scope=scope).get("authorization", "").encode()
            if not hmac.compare_digest(given, self._expected):
                return await JSONResponse({"error": {"message": "no valid token"}}, 401)(scope, receive, send)
        return await self._app(scope, receive, send)


def _read(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        yield from load_file(path).items()


def register() -> None:
    """Entry point; vLLM may call it more than once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FilesWeightTransferEngine)
