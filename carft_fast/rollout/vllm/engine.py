"""Engine "vllm": vLLM in the trainer's process. Weights are replaced in place; memory can be freed between calls."""

import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from carft_fast.config import Config
from carft_fast.models import CarftModel, SamplerWeights, WeightUpdate
from carft_fast.rollout.base import Progress, Prompts, Rollout, SamplingParams, check_request
from carft_fast.rollout.vllm import adapter
from carft_fast.rollout.vllm.adapter_files import AdapterFiles


class VLLMEngine:
    """Holds random weights until the first `sync`.

    With `rollout.sleep_level` the engine sleeps after every `generate`; a sync or the next generate wakes it. Level 1
    frees the KV cache and keeps the weights in host memory. Level 2 drops both: the trainer sends the weights again.
    """

    def __init__(self, config: Config, model: CarftModel, ends: Sequence[int]) -> None:
        self._ends = ends
        self._context = config.data.max_length
        self._dtype = adapter.engine_dtype(config)
        self._sleep_level = config.rollout.sleep_level
        self._asleep = False
        self._model: Callable[[], CarftModel | None] = lambda: None
        self.version = -1
        self._whole = False  # all weights are of `version`
        options = adapter.engine_options(config, model.device.type, dedicated=False)
        with tempfile.TemporaryDirectory(prefix="carft-model-") as folder:
            adapter.write_model_folder(model.lm.config, Path(folder))
            self._engine = adapter.LocalEngine(Path(folder), options)
        by_adapters = adapter.sends_adapters(config, model.device.type)
        self._adapters = AdapterFiles(config.rollout.transfer_dir) if by_adapters else None

    def generate(
        self, prompts: Prompts, sampling: SamplingParams, *, on_progress: Progress | None = None
    ) -> list[Rollout]:
        check_request(prompts, sampling, context=self._context, weights_whole=self._whole)
        if self._asleep:
            self._engine.wake()
            self._asleep = False
            if self._sleep_level == 2:  # the weights are gone, and the trainer's are still those of the last sync
                model = self._model()
                assert model is not None
                weights = SamplerWeights(model.lm, self._dtype, merge=self._adapters is None)
                self._engine.load(weights, self._adapters.path if self._adapters else None, self.version)
        try:
            return self._engine.generate(prompts, sampling, self._ends, self.version, on_progress or (lambda _: None))
        finally:
            if self._sleep_level:
                self._engine.sleep(self._sleep_level)
                self._asleep = True

    def sync(self, model: CarftModel) -> int:
        holds_frozen = self._whole and self._model() is model and not (self._asleep and self._sleep_level == 2)
        self._model = weakref.ref(model)  # a finished stage must not stay in memory
        self._whole = False
        if self._asleep:
            self._engine.wake("weights")  # the KV cache comes back after the update, when its peak is over
        unmerged = self._adapters is not None
        update = WeightUpdate.of(model.lm, self._dtype, unmerged=unmerged, frozen=not holds_frozen)
        files = None
        if self._adapters and update.adapters is not None:
            files = self._adapters.write(model.lm, update.adapters, str(self.version + 1))
        self._engine.load(update.weights, files, self.version + 1)
        if self._asleep:
            self._engine.wake("kv_cache")
            self._asleep = False
        self.version += 1
        self._whole = True
        return self.version

    def close(self) -> None:
        if hasattr(self, "_engine"):
            if self._adapters:
                self._adapters.close()
            self._engine.close()
            del self._engine
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
