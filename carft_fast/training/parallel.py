"""A model in training and its optimizer, on one process or divided over several: DDP, FSDP2, DeepSpeed ZeRO-2 and 3.

A loss here is this process's part of the whole: its normalisers count the rows of all processes. So gradients are
summed, never averaged. Where a library averages, the loss is multiplied by the number of processes first.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from carft_fast.config import Config, StageConfig, Strategy
from carft_fast.core import InputError, is_main, rank, world_size
from carft_fast.models import CarftModel
from carft_fast.training.checkpoint import OPTIMIZER_FILE, has_sharded, load_trained, trained_tensors
from carft_fast.training.optim import MOMENTS, build_optimizer, check_optimizer, optimizer_step, set_learning_rate

T = TypeVar("T")
BUCKET = 2**27
"""Bytes of gradients that one all-reduce carries."""


class Learner:
    """A whole copy of model and optimizer on every process (one process, DDP)."""

    keeps_graphs = True
    """Whether the model may be called again before the backward of an earlier call."""

    def __init__(self, model: CarftModel, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradient. `last`: the optimizer step is next."""
        loss.backward()
        if last and world_size() > 1:
            _sum_gradients(self.model)

    def load(self, checkpoint: Path) -> None:
        """Read what `load_model` does not: moments, and weights that are sharded on disk."""
        load_trained(checkpoint, self.model, self.optimizer)

    def gather_state(self) -> dict[str, Tensor] | None:
        """For `CheckpointStore.save`, on all processes; None where the store reads model and optimizer itself."""
        return None

    def close(self) -> None:
        """Release what would keep the model in memory."""

    def replace_weights(self, restored: CarftModel) -> None:
        """Take another model's weights and clear the moments."""
        self.model.load_state_dict(restored.state_dict())
        self.optimizer.state.clear()

    def step(self, lr: float, max_grad_norm: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, step, clear; returns the gradient norm before clipping, and 1 where it or `loss` is not finite, else 0.

        In that case weights, moments and the count of steps stay as they are. `loss` is that of all processes. Both
        results are tensors: the host does not wait for the device.
        """
        set_learning_rate(self.optimizer, lr)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        skipped = (~(norm.isfinite() & loss.isfinite())).float()
        optimizer_step(self.optimizer, skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, skipped


def _sum_gradients(model: nn.Module) -> None:
    """Over all processes, in buckets. Every process has gradients for the same parameters."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in [p.grad for p in model.parameters() if p.grad is not None]:
        bucket.append(gradient)
        size += gradient.nbytes
        if size >= BUCKET:
            _sum_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


class ShardedLearner(Learner):
    """FSDP2: weights, gradients and moments divided, a layer whole while it computes."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss * world_size()).backward()

    def replace_weights(self, restored: CarftModel) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        weights = restored.state_dict() if is_main() else {}
        set_model_state_dict(
            self.model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        )
        self.optimizer.state.clear()


def shard(model: CarftModel, device: torch.device, *, offload: bool = False) -> None:
    """Divide the main process's weights over all processes, layer by layer. The others' may be on the meta device.

    In bfloat16 the layers' weights travel in it, and gradients are summed in float32. `offload` keeps the shards in
    host memory and brings a layer to the device while it computes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # of a loss that is a view: nothing here changes it in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    half = model.compute_dtype != torch.float32
    precision = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    common: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world_size(),)),
        "reshard_after_forward": True,
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for layer in model.layers():
        _get_weights(layer, device)
        fully_shard(layer, mp_policy=precision, **common)
    _get_weights(model, device)
    fully_shard(model, **common)
    model.divided = True


def _get_weights(module: nn.Module, device: torch.device) -> None:
    """The main process's parameters and buffers, whole on every process's device, but for those divided already."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            _get(tensor, device)


@torch.no_grad()
def _get(tensor: Tensor, device: torch.device) -> None:
    if tensor.device.type == "meta":
        _set_data(tensor, torch.empty_like(tensor, device=device))
    elif tensor.device != device:
        tensor.data = tensor.to(device)
    dist.broadcast(tensor, src=0)


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor of the meta device data; it stays the same object for all modules and optimizers that hold it."""
    if isinstance(tensor, nn.Parameter):
        data = nn.Parameter(data, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, data)


class DeepSpeedLearner(Learner):
    """ZeRO-2 (gradients and moments divided) or ZeRO-3 (weights as well)."""

    def __init__(self, config: Config, model: CarftModel, stage: StageConfig, device: torch.device) -> None:
        settings = {
            "gradient_clipping": stage.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self._engine, optimizer = _deepspeed_engine(config, model, device, build_optimizer(model, stage), settings)
        super().__init__(model, optimizer)
        self.keeps_graphs = strategy(config) == "zero2"  # else backward computes with weights that are no longer there

    def load(self, checkpoint: Path) -> None:
        if has_sharded(checkpoint):
            raise InputError(
                f"{checkpoint} is sharded: DeepSpeed goes on from whole ones only; resume with fsdp2 or ddp"
            )
        tensors = load_file(checkpoint / OPTIMIZER_FILE)
        steps = {float(tensor) for name, tensor in tensors.items() if name.endswith("/step")}
        self._start_moments(max(steps, default=0.0))
        for name, parameter in self.model.named_parameters():
            for key in MOMENTS:
                if (saved := tensors.get(f"{name}/{key}")) is not None:
                    _put_moment(parameter, saved, key)

    def _start_moments(self, step: float) -> None:
        """Make the state that AdamW would make at its first step."""
        zero = self._engine.optimizer
        divided = hasattr(zero, "fp32_partitioned_groups_flat")  # ZeRO-3
        for flat in zero.fp32_partitioned_groups_flat if divided else zero.single_partition_of_fp32_groups:
            state = {key: torch.zeros_like(flat) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(step, device=flat.device), **state}
        if not divided:
            zero._lazy_init_hp_params_optimizer_state()

    def gather_state(self) -> dict[str, Tensor] | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        from carft_fast.models import gathered

        step = max((float(s["step"]) for s in self._engine.optimizer.optimizer.state.values() if s), default=0.0)
        tensors: dict[str, Tensor] = {}
        for name, tensor in trained_tensors(self.model, keep_vars=True).items():
            with gathered([tensor]):
                if is_main():
                    tensors[f"model.{name}"] = tensor.detach().to("cpu", copy=True)
        trained = [(name, x) for name, x in self.model.named_parameters() if x.requires_grad] if step else []
        for name, parameter in trained:
            for key in MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, key)
                if is_main() and moment is not None:
                    tensors[f"optimizer.{name}.{key}"] = moment.detach().to("cpu", copy=True)
                    tensors[f"optimizer.{name}.step"] = torch.tensor(step)
        return tensors

    def close(self) -> None:
        self._engine.destroy()
        del self.model.forward  # the engine's, which knows the model

    def replace_weights(self, restored: CarftModel) -> None:
        raise RuntimeError("check_strategy refuses it before the run")

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # the engine checks gradients alone: a loss that is not finite has to spoil them
        factor = torch.where(loss.detach().isfinite(), float(world_size()), torch.nan)
        self._engine.backward(loss * factor, scale_wrt_gas=False)

    def step(self, lr: float, max_grad_norm: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """DeepSpeed clips to the stage's max_grad_norm itself, and leaves out a step whose gradient is not finite."""
        set_learning_rate(self.optimizer, lr)
        self._engine.step()
        skipped = bool(self._engine.optimizer.overflow)
        norm = float("nan") if skipped else float(self._engine.get_global_grad_norm())
        return torch.tensor(norm, device=loss.device), torch.tensor(float(skipped), device=loss.device)


class _Inner(nn.Module):
    """What DeepSpeed wraps: the model's own forward, whose place the engine's takes."""

    def __init__(self, model: CarftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        return function(self.model, *args, **options)


def _make_room(model: CarftModel, device: torch.device) -> None:
    """What `deepspeed.zero.Init` needs: it takes one parameter after another from the host to the device, fills it with
    the main process's and divides it, and leaves buffers where they are. Host memory for parameters without data stays
    untouched.
    """
    for parameter in model.parameters():
        if parameter.device.type == "meta":
            _set_data(parameter, torch.empty_like(parameter, device="cpu"))
    for buffer in model.buffers():
        _get(buffer, device)


def _deepspeed_engine(
    config: Config,
    model: CarftModel,
    device: torch.device,
    optimizer: Any = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer; from now on calls of `model` go through the engine."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    zero = _accelerate_zero() if config.distributed.strategy == "auto" else {"stage": int(strategy(config)[-1])}
    # DeepSpeed wants a batch size; Learner.backward sets the boundary of a step
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **(settings or {})}
    if int(zero["stage"]) == 3:
        _make_room(model, device)
        deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    engine, optimizer, _, _ = deepspeed.initialize(model=_Inner(model), optimizer=optimizer, config=settings)
    model.forward = engine.__call__  # type: ignore[method-assign]
    model.divided = True
    return engine, optimizer


def _put_moment(parameter: Any, whole: Tensor, key: str) -> None:
    """This process's part of a moment, in its place among ZeRO's flat tensors."""
    if not hasattr(parameter, "ds_id"):
        parameter.set_full_hp_param(whole, key)
        return
    # deepspeed.utils.safe_set_full_optimizer_state fails where the last part is shorter than the others
    part, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=key
    )
    mine = whole.flatten()[len(part) * rank() : len(part) * (rank() + 1)]
    part[: len(mine)].copy_(mine)


def strategy(config: Config) -> Strategy:
    """`distributed.strategy`, where "auto" is what accelerate's launcher asks for; "ddp" for one process.

    Raises InputError for what this trainer does not do: FSDP 1, mixed precision by accelerate, a missing DeepSpeed.
    """
    if world_size() == 1:
        return "ddp"
    configured = config.distributed.strategy
    asked = _of_accelerate() if configured == "auto" else configured
    if asked in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise InputError(f'distributed.strategy "{asked}" needs DeepSpeed: pip install ".[deepspeed]", in the checkout')
    return asked


def check_strategy(config: Config, stages: Sequence[str]) -> None:
    """Raises InputError where `strategy` does, and for a stage that it cannot run."""
    how = strategy(config)
    for stage in stages:
        check_optimizer(config, stage, how)
    refused = (
        ('guard.action = "rollback"', config.guard.action == "rollback", '"off" and "stop"'),
        ("rl.gradient_terms = true", config.rl.gradient_terms, "false"),
    )
    for setting, chosen, allowed in refused:
        if how in ("zero2", "zero3") and "rl" in stages and chosen:
            raise InputError(
                f'{setting} is not possible with distributed.strategy "{how}" (DeepSpeed): allowed are {allowed}, or '
                'the strategies "fsdp2" and "ddp"'
            )


def _of_accelerate() -> Strategy:
    def on(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("true", "1", "yes")

    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise InputError(
            f'accelerate\'s config has mixed_precision "{precision}": set it to "no", model.compute_dtype decides here'
        )
    if on("ACCELERATE_USE_FSDP"):
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise InputError(f"accelerate's config has fsdp_version {version}: 2 is needed, see configs/accelerate")
        return "fsdp2"
    if on("ACCELERATE_USE_DEEPSPEED"):
        zero = _accelerate_zero()
        stage = int(zero["stage"])
        if stage not in (2, 3):
            raise InputError(f"accelerate's config has zero_stage {stage}: allowed here are 2 and 3")
        for part in ("offload_optimizer", "offload_param"):
            if (device := (zero.get(part) or {}).get("device") or "none") != "none":
                raise InputError(
                    f'accelerate\'s config has {part}_device "{device}": that is not tested here; allowed is "none"'
                )
        return "zero2" if stage == 2 else "zero3"
    return "ddp"


def _accelerate_zero() -> dict[str, Any]:
    from accelerate.utils import DeepSpeedPlugin

    zero = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    return {key: value for key, value in zero.items() if value != "auto"}


def build_learner(config: Config, model: CarftModel, stage: StageConfig, device: torch.device) -> Learner:
    """`model` with its optimizer, divided as `strategy` says and checked."""
    how = strategy(config)
    learner: Learner
    if how in ("zero2", "zero3"):
        learner = DeepSpeedLearner(config, model, stage, device)
    elif how == "fsdp2":
        shard(model, device)
        learner = ShardedLearner(model, build_optimizer(model, stage))
    else:
        learner = Learner(model, build_optimizer(model, stage))
    _check_divided(model)
    return learner


def _check_divided(model: CarftModel) -> None:
    """On the device, by all processes: on the host every process would need room for a whole model at work."""
    if model.plain_head is None:
        model(CarftModel.check)


def divide_frozen(config: Config, model: CarftModel, device: torch.device, *, offload: bool) -> None:
    """A model that is not trained, divided like the one that is."""
    how = strategy(config)
    if how == "fsdp2":
        shard(model, device, offload=offload)
    elif how == "zero3":
        _deepspeed_engine(config, model, device)
    _check_divided(model)
