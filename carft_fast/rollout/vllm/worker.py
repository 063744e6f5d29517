"""vLLM's worker with the project's own choice of tokens (see `rollout/coupled.py`). vLLM's processes load it by name.

It replaces `GPUModelRunner._sample`, also the CPU's. Of a request's sampling parameters it knows temperature, top-p,
top-k, seed and log-probs; no other ones are ever sent by `adapter.sampling_fields`.
"""

import ast
import importlib
import inspect
import itertools
import operator
import textwrap
import zlib
from typing import Any

import torch
from torch import Tensor

from carft_fast.core import EngineError
from carft_fast.rollout.coupled import pick, processed_logits
from carft_fast.rollout.drafts import LONGEST, Usefulness, find_draft
from carft_fast.rollout.vllm.adapter import BUDGET, check_installed

Worker: Any
try:
    from vllm import _custom_ops
    from vllm.platforms import current_platform
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    else:
        from vllm.v1.worker.gpu_worker import Worker
except ImportError as error:
    raise EngineError(
        f"vLLM {check_installed()} lacks what rollouts need of vLLM 0.32 ({error}): install vLLM 0.32, or set "
        'rollout.engine = "hf"'
    ) from error

onednn_mm = _custom_ops.onednn_mm
RELOAD = "vllm.model_executor.model_loader.reload"
TRANSFER = "vllm.distributed.weight_transfer"
KNOWN: dict[str, tuple[str, list[str] | None]] = {
    "GPUModelRunner._sample": ("vllm.v1.worker.gpu_model_runner", ["self", "logits", "spec_decode_metadata"]),
    "SamplerOutput": ("vllm.v1.outputs", ["sampled_token_ids", "logprobs_tensors"]),
    "onednn_mm": ("vllm._custom_ops", ["dnnl_handler", "x", "bias"]),
    "set_current_vllm_config": ("vllm.config", None),
    "Attention": ("vllm.model_executor.layers.attention", None),
    "UnquantizedLinearMethod": ("vllm.model_executor.layers.linear", None),
    "UnquantizedEmbeddingMethod": ("vllm.model_executor.layers.vocab_parallel_embedding", None),
    "VocabParallelEmbedding": ("vllm.model_executor.layers.vocab_parallel_embedding", None),
    "initialize_layerwise_reload": (RELOAD, None),
    "finalize_layerwise_reload": (RELOAD, None),
    "get_layerwise_info": (f"{RELOAD}.layerwise", None),
    "WeightTransferEngine": (f"{TRANSFER}.base", None),
    "WeightTransferInitInfo": (f"{TRANSFER}.base", None),
    "WeightTransferUpdateInfo": (f"{TRANSFER}.base", None),
    "WeightTransferEngineFactory": (f"{TRANSFER}.factory", None),
    "WeightTransferEngineFactory._registry": (f"{TRANSFER}.factory", None),
}
"""What is replaced, built or imported by in_place.py and plugin.py: its module, and its parameters where they matter.
Of vLLM 0.32 (run); those with parameters were read in 0.33, too (not run)."""
OF_THE_RUNNER = (
    "requests",
    *("input_batch.num_reqs", "input_batch.req_ids", "input_batch.num_tokens_no_spec", "input_batch.sampling_metadata"),
)
OF_A_DRAFTING_RUNNER = ("effective_drafter_max_model_len", "input_batch.token_ids_cpu")
PROPOSED = ["sampled_token_ids", "self.input_batch.num_tokens_no_spec", "self.input_batch.token_ids_cpu"]
"""What the runner calls `DraftProposer.propose` with."""


def check_internals(runner: Any) -> None:
    """Raises EngineError where vLLM is not the one that this file, in_place.py and plugin.py were written for."""
    for name, (module, expected) in KNOWN.items():
        parameters = "" if expected is None else f"({', '.join(expected)})"
        if (found := _find(module, name)) is None:
            raise _refusal(f"no {name}", f"{name}{parameters}")
        if expected is not None and (given := list(inspect.signature(found).parameters)) != expected:
            raise _refusal(f"{name}({', '.join(given)})", f"{name}{parameters}")
    if not isinstance(runner, GPUModelRunner):
        raise EngineError(
            f"vLLM {check_installed()} runs {type(runner).__module__}.{type(runner).__qualname__}; rollouts need "
            "vLLM 0.32's GPUModelRunner of vllm.v1.worker: unset VLLM_USE_V2_MODEL_RUNNER, or set it to 0"
        )
    drafts = isinstance(getattr(runner, "drafter", None), DraftProposer)
    for attribute in OF_THE_RUNNER + OF_A_DRAFTING_RUNNER * drafts:
        try:
            operator.attrgetter(attribute)(runner)
        except AttributeError:
            raise _refusal(f"no GPUModelRunner.{attribute}", f"GPUModelRunner.{attribute}") from None
    if drafts and (proposed := _proposed()) != PROPOSED:
        found = "no call of propose" if proposed is None else f"propose({', '.join(proposed)})"
        raise EngineError(
            f"vLLM {check_installed()} has {found} for drafts; they need propose({', '.join(PROPOSED)}) of vLLM 0.32: "
            'install vLLM 0.32, or set rollout.drafts = "off"'
        )


def _refusal(has: str, needed: str) -> EngineError:
    return EngineError(
        f"vLLM {check_installed()} has {has}; rollouts need {needed} of vLLM 0.32: install vLLM 0.32, or set "
        'rollout.engine = "hf"'
    )


def _find(module: str, name: str) -> Any:
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return None


def _proposed() -> list[str] | None:
    """The positional arguments that the runner gives to a proposer of method "custom_class", from its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(GPUModelRunner.propose_draft_token_ids)))
    except (AttributeError, OSError, TypeError):
        return None
    branches = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "'custom_class'" in ast.unparse(n.test)]
    calls = [
        node
        for branch in branches
        for statement in branch.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "propose"
    ]
    return [ast.unparse(argument) for argument in calls[0].args] if calls else None


def rounds_alike(dnnl_handler: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """vLLM's matmul on the CPU, [..., K] times [K, N], whose rounding of a row depends on whether it is alone.

    oneDNN adds up a single row's products in another order where K is above 1,024. A row alone is multiplied twice, so
    that a sequence's tokens do not depend on others that are decoded with it, nor on drafts.
    """
    if x.shape[:-1].numel() != 1:
        return onednn_mm(dnnl_handler, x, bias)
    return onednn_mm(dnnl_handler, torch.cat([x, x]), bias)[: len(x)]


class CoupledWorker(Worker):
    """The worker of this platform; every model runner it makes samples by the coupled rule."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        check_internals(runner)
        _custom_ops.onednn_mm = rounds_alike
        runner._sample = CoupledSampler(runner)
        if isinstance(drafter := getattr(runner, "drafter", None), DraftProposer):
            drafter.runner = runner
            # The runner drafts zeros where the context may end within a draft; the proposer's drafts end before.
            runner.effective_drafter_max_model_len += LONGEST


class CoupledSampler:
    """In place of a model runner's `_sample`. A draft token stands if and only if it is the one that the rule picks."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __call__(self, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        """`logits` [rows, V]: a row for each request and one more for each of its draft tokens, request by request."""
        batch = self._runner.input_batch
        requests = batch.num_reqs
        most = batch.sampling_metadata.max_num_logprobs
        drafts: list[list[int]] = [[] for _ in range(requests)]
        if spec_decode_metadata is not None:
            tokens = iter(spec_decode_metadata.draft_token_ids.tolist())
            drafts = [[next(tokens) for _ in range(count)] for count in spec_decode_metadata.num_draft_tokens]
        starts = list(itertools.accumulate((len(draft) + 1 for draft in drafts), initial=0))
        width = 1 + max(map(len, drafts), default=0)
        token_RW = torch.full((requests, width), -1, dtype=torch.int32, device=logits.device)
        ids_RWK = value_RWK = None
        if most is not None:
            ids_RWK = torch.zeros(requests, width, most + 1, dtype=torch.int32, device=logits.device)
            value_RWK = torch.zeros(requests, width, most + 1, device=logits.device)
        at_work = list(range(requests))
        for depth in range(width):
            rows = logits if width == 1 else logits[[starts[request] + depth for request in at_work]]
            processed, token_N = self._pick(rows, at_work, depth)
            token_RW[at_work, depth] = token_N.int()
            if ids_RWK is not None and value_RWK is not None:
                logprob_NV = processed.log_softmax(-1)
                top = logprob_NV.topk(most)
                ids_RWK[at_work, depth] = torch.cat([token_N[:, None], top.indices], 1).int()
                value_RWK[at_work, depth] = torch.cat([logprob_NV.gather(1, token_N[:, None]), top.values], 1)
            if width > 1:
                picked = zip(at_work, token_N.tolist(), strict=True)
                at_work = [request for request, token in picked if drafts[request][depth : depth + 1] == [token]]
                if not at_work:
                    break
        logprobs = None
        if ids_RWK is not None and value_RWK is not None:
            ranks = torch.zeros(requests * width, dtype=torch.int64, device=logits.device)  # nobody reads them
            logprobs = LogprobsTensors(ids_RWK.flatten(0, 1), value_RWK.flatten(0, 1), ranks)
        return SamplerOutput(token_RW, logprobs)

    def _pick(self, rows: Tensor, requests: list[int], depth: int) -> tuple[Tensor, Tensor]:
        """Processed logits of a row for each of the requests, and the tokens `depth` after what they have so far."""
        batch = self._runner.input_batch
        asked = batch.sampling_metadata
        if asked.temperature is None:  # all are greedy
            processed = rows.float()
            return processed, processed.argmax(-1)
        temperature_N = asked.temperature[requests]
        top_k_N, top_p_N = (None if cut is None else cut[requests] for cut in (asked.top_k, asked.top_p))
        greedy_N = None if asked.all_random else temperature_N == 0
        if greedy_N is not None:
            temperature_N = temperature_N.masked_fill(greedy_N, 1.0)
        processed = processed_logits(rows, temperature_N, top_k_N, top_p_N)
        names = [batch.req_ids[request] for request in requests]
        given = [self._runner.requests[name].sampling_params.seed for name in names]
        # Without a seed of its own a request gets one from its name.
        seeds = [zlib.crc32(n.encode()) if seed is None else seed for n, seed in zip(names, given, strict=True)]
        positions = [int(batch.num_tokens_no_spec[request]) + depth for request in requests]
        token_N = pick(processed, seeds, positions)
        return processed, token_N if greedy_N is None else torch.where(greedy_N, processed.argmax(-1), token_N)


class DraftProposer:
    """vLLM's way to a draft: `speculative_config` names this class, `runner` is set by the worker.

    A request brings its drafts along, so the server keeps nothing of them but how many stood of late.
    """

    runner: Any

    def __init__(self, vllm_config: Any) -> None:
        self._budget: int = vllm_config.additional_config[BUDGET]
        self._longest: int = vllm_config.speculative_config.num_speculative_tokens
        self._usefulness = Usefulness()
        self._guessed = 0  # in the forward that is being proposed for

    def load_model(self, *_: Any, **__: Any) -> None:
        """vLLM calls it on the CPU."""

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **_: Any
    ) -> list[list[int]]:
        rows = sum(map(bool, sampled_token_ids))
        self._usefulness.add(self._guessed, sum(map(len, sampled_token_ids)) - rows)
        self._guessed = 0
        most = min(self._longest, self._budget // max(1, rows) - 1)
        if most < 1:
            return [[] for _ in sampled_token_ids]
        least = self._usefulness.shortest_match
        found = [
            self._draft(request, int(num_tokens_no_spec[request]), token_ids_cpu[request], most, least)
            if sampled
            else []
            for request, sampled in enumerate(sampled_token_ids)
        ]
        self._guessed = sum(map(len, found))
        return found

    def _draft(self, request: int, tokens: int, token_ids: Any, most: int, least: int) -> list[int]:
        state = self.runner.requests[self.runner.input_batch.req_ids[request]]
        params = state.sampling_params
        drafts = (params.extra_args or {}).get("drafts")
        most = min(most, state.num_prompt_tokens + params.max_tokens - tokens - 1)  # one more is sampled after a draft
        if not drafts or most < 1:
            return []
        return list(find_draft(drafts, token_ids[state.num_prompt_tokens : tokens].tolist(), most, least))
