"""vLLM's worker with the project's own choice of tokens (see `rollout/coupled.py`). vLLM's processes load it by name.

It replaces `GPUModelRunner._sample`, also the CPU's. Of a request's sampling parameters it knows temperature, top-p,
top-k, seed and log-probs; no other ones are ever sent by `adapter.sampling_fields`.
"""

import inspect
import zlib
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from carft_fast.core import EngineError
from carft_fast.rollout.coupled import pick, processed_logits
from carft_fast.rollout.vllm.adapter import check_installed

Worker: Any
if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

KNOWN = {
    "GPUModelRunner._sample": (GPUModelRunner, "_sample", ["self", "logits", "spec_decode_metadata"]),
    "SamplerOutput": (SamplerOutput, "__init__", ["self", "sampled_token_ids", "logprobs_tensors"]),
}
"""What is replaced or built, with its parameters in vLLM 0.32."""


def check_internals(runner: Any) -> None:
    """Raises EngineError where vLLM is not the one that `CoupledSampler` was written for."""
    for name, (owner, method, expected) in KNOWN.items():
        found = list(inspect.signature(getattr(owner, method)).parameters) if hasattr(owner, method) else None
        if found != expected:
            has = f"no {name}" if found is None else f"{name}({', '.join(found)})"
            raise EngineError(
                f"vLLM {check_installed()} has {has}; rollouts need {name}({', '.join(expected)}) of vLLM 0.32: "
                'install vLLM 0.32, or set rollout.engine = "hf"'
            )
    if not isinstance(runner, GPUModelRunner):
        raise EngineError(
            f"vLLM {check_installed()} runs {type(runner).__module__}.{type(runner).__qualname__}; rollouts need "
            "vLLM 0.32's GPUModelRunner of vllm.v1.worker: unset VLLM_USE_V2_MODEL_RUNNER, or set it to 0"
        )


class CoupledWorker(Worker):
    """The worker of this platform; every model runner it makes samples by the coupled rule."""

    def init_device(self) -> None:
        super().init_device()
        check_internals(self.model_runner)
        self.model_runner._sample = CoupledSampler(self.model_runner)


class CoupledSampler:
    """In place of a model runner's `_sample`."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __call__(self, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        batch = self._runner.input_batch
        asked = batch.sampling_metadata
        requests = [self._runner.requests[name].sampling_params for name in batch.req_ids[: batch.num_reqs]]
        greedy = [request.temperature == 0 for request in requests]
        seeds = [
            zlib.crc32(name.encode()) if request.seed is None else request.seed
            for name, request in zip(batch.req_ids, requests, strict=False)
        ]
        positions = batch.num_tokens_no_spec[: batch.num_reqs].tolist()
        processed = self._processed(logits, asked)
        token_N = processed.argmax(-1) if all(greedy) else pick(processed, seeds, positions)
        if any(greedy) and not all(greedy):
            token_N = torch.where(torch.tensor(greedy, device=token_N.device), processed.argmax(-1), token_N)
        return SamplerOutput(token_N[:, None].int(), self._logprobs(processed, token_N, asked.max_num_logprobs))

    def _processed(self, logits: Tensor, asked: Any) -> Tensor:
        if asked.temperature is None:  # all requests are greedy
            return logits.float()
        temperature = torch.where(asked.temperature == 0, 1.0, asked.temperature)
        return processed_logits(logits, temperature, asked.top_k, asked.top_p)

    def _logprobs(self, processed: Tensor, token_N: Tensor, most: int | None) -> LogprobsTensors | None:
        """Of the distribution sampled from. The ranks, which nobody reads, are 0."""
        if most is None:
            return None
        logprob_NV = processed.log_softmax(-1)
        top = logprob_NV.topk(most)
        ids = torch.cat([token_N[:, None], top.indices], 1)
        values = torch.cat([logprob_NV.gather(1, token_N[:, None]), top.values], 1)
        return LogprobsTensors(ids.int(), values, torch.zeros_like(token_N))
