"""LoRA for vLLM, unmerged: each sync writes the adapters as peft does, into a folder that vLLM's own loader reads."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from carft_fast.core import EngineError
from carft_fast.rollout.vllm.scratch import scratch_folder

NAME = "carft-adapter"
"""What vLLM calls the policy's adapters."""


class AdapterFiles:
    """The adapters of the current version, in memory (/dev/shm) unless `folder` says otherwise."""

    def __init__(self, folder: str = "") -> None:
        self._folder = scratch_folder("carft-adapters-", folder)
        self.path: Path | None = None
        """A peft folder; a new one each time, because vLLM takes an equal path for equal weights."""

    def write(self, lm: Any, tensors: Mapping[str, Tensor], weight_version: str) -> Path:
        """`tensors` of `adapter_weights(lm, ...)`. Raises EngineError where there is no room."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path = self._folder / weight_version
        try:
            self.path.mkdir()
            save_file(dict(tensors), self.path / "adapter_model.safetensors")
            lm.peft_config["default"].save_pretrained(str(self.path))
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the adapters could not be written to {self._folder} ({error}): set rollout.transfer_dir to a folder "
                "with room for them"
            ) from None
        return self.path

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
