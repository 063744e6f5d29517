"""Checkpoints: what a run needs to go on, whole or not there at all, and checked before it is used.

Plain (one process, or several with the same weights): a Hugging Face model folder with the two heads and
`optimizer.safetensors`, AdamW's moments by parameter name. With LoRA the model is its adapters, as peft saves them.
Sharded (FSDP2): `sharded/` has weights and moments, written by torch.distributed.checkpoint in safetensors. Any number
of processes can read it. Both have the tokenizer, the run's `config.toml`, `trainer_state.json` and `manifest.json`.

Data order, sampling seeds and learning rate are functions of (seed, stage, step), and there is no dropout. So seed and
step are all the random and scheduler state.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from carft_fast.config import Config, differences, fingerprint, load_config, to_toml
from carft_fast.core import (
    MANIFEST,
    TEMPORARY,
    InputError,
    find_damage,
    on_main,
    publish,
    rank,
    read_json_object,
    read_manifest,
    remove_folder,
    set_aside,
    world_size,
    writing_folder,
)
from carft_fast.models import HEADS_CONFIG, CarftModel
from carft_fast.training.optim import MOMENTS, state_from_tensors, state_tensors

STATE_FILE = "trainer_state.json"
RUN_CONFIG_FILE = "config.toml"
OPTIMIZER_FILE = "optimizer.safetensors"
SHARDED = "sharded"
RUN_FILES = (SHARDED, OPTIMIZER_FILE, RUN_CONFIG_FILE, STATE_FILE, MANIFEST)
"""What a checkpoint has that a model folder has not."""
FORMAT = 2
STAGES = ("sft", "rl")
"""In the order of a run."""

_NAME = re.compile(rf"({'|'.join(STAGES)})-(\d+)")

Tensors = dict[str, Tensor]
T = TypeVar("T")


class CheckpointStore:
    """`folder/<stage>-<step>` folders, `folder/best` a link to the best evaluated one.

    In a process group every rank calls every method, with the same arguments; what one of them raises, all raise.
    """

    def __init__(self, folder: Path, config: Config, log: Callable[[str], None]) -> None:
        self._folder = folder
        self._best_link = folder / "best"
        self._config = config
        self._log = log
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def save(
        self,
        stage: str,
        step: int,
        model: CarftModel,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        *,
        model_path: str,
        seed: int,
        best: bool = False,
        whole: Tensors | None = None,
    ) -> Path:
        """Write the state after `step` steps of `stage`; `best` also points the best link at it.

        `model_path` is what the stage began with. `whole` is `Learner.gather_state`. With output.async_save this
        returns once the tensors are copied to the host; `wait` raises a failure of the write.
        """
        self.wait()
        target = self._folder / f"{stage}-{step:06d}"
        if self._on_main(target.exists):  # the same step of the same run holds the same bits
            self._on_main(lambda: self._settle(target, best))
            return target
        sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        tensors = (whole or _tensors(model, optimizer)) if sharded or rank() == 0 else {}
        needed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._config.output.async_save:
            tensors = _host_copy(tensors)

        def begin() -> None:
            """The small files, before the trainer goes on: it uses the tokenizer."""
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            tokenizer.save_pretrained(temporary)
            (temporary / RUN_CONFIG_FILE).write_text(to_toml(self._config), encoding="utf-8")
            start = _portable(model_path, self._folder)
            state = {"format": FORMAT, "stage": stage, "step": step, "seed": seed, "model_path": start}
            (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
            if sharded:
                _write_description(temporary, model)

        def finish() -> None:
            if not sharded:
                _write_plain(temporary, model, tensors)
            publish(temporary, target)
            self._settle(target, best)

        def write() -> None:
            with writing_folder(target, needed_bytes):
                if sharded:  # every rank writes its part
                    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

                    writer = HuggingFaceStorageWriter(str(temporary / SHARDED), save_distributed=True)
                    save(tensors, storage_writer=writer, process_group=self._group)
                self._on_main(finish)

        with writing_folder(target, needed_bytes) as temporary:
            self._on_main(begin)
        if self._config.output.async_save:
            thread = ThreadPoolExecutor(1, "checkpoint")
            self._pending = thread.submit(write)
            thread.shutdown(wait=False)  # it ends after this write
        else:
            write()
        return target

    def wait(self) -> None:
        """Wait until the save under way is on disk; raises its failure."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def check(self) -> None:
        """Raise the failure of a save that has ended. With several ranks only `save` and `wait` do, on all at once."""
        if self._pending is not None and self._pending.done() and world_size() == 1:
            self.wait()

    def close(self) -> None:
        self.wait()

    def latest(self, stage: str) -> tuple[Path, int] | None:
        """The newest whole checkpoint of a stage and the number of steps it has done; damaged ones are set aside."""

        def find() -> tuple[Path, int] | None:
            found = [path for path in self._all() if path.name.startswith(f"{stage}-")]
            for path in reversed(found):
                if self._is_whole(path):
                    return path, int(read_state(path)["step"])
            if found:
                self._log(f"{stage}: no whole checkpoint is left, the stage starts from its beginning")
            return None

        self.wait()
        return self._on_main(find)

    def best(self, stage: str) -> Path | None:
        """The best evaluated checkpoint, where it is one of this stage and whole."""

        def find() -> Path | None:
            target = self._best_target()
            if target in self._all() and target.name.startswith(f"{stage}-") and self._is_whole(target):
                return target
            return None

        self.wait()
        return self._on_main(find)

    def has_model(self, folder: Path) -> bool:
        """Whether the model that a stage ended with is there, and whole; a damaged one is set aside."""
        return self._on_main(lambda: folder.is_dir() and self._is_whole(folder))

    def clean(self) -> None:
        """Remove what a killed write left behind."""
        for path in self._folder.parent.rglob(f"{TEMPORARY}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _all(self) -> list[Path]:
        return _checkpoints(self._folder)

    def _best_target(self) -> Path | None:
        return self._folder / os.readlink(self._best_link) if self._best_link.is_symlink() else None

    def _settle(self, target: Path, best: bool) -> None:
        """After a checkpoint is in place: set the best link, then delete those that are no longer kept."""
        if best:
            link = self._folder / f"{TEMPORARY}best"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            os.replace(link, self._best_link)
        earlier = [path for path in self._all() if _order(path) < _order(target)]
        places = self._config.output.keep_last - 1
        # one of the earlier ones that stay is checked: a damaged one is set aside, and an older one stays instead
        while places and earlier[:-places] and not any(self._is_whole(path) for path in earlier[-places:]):
            earlier = [path for path in earlier if path.exists()]
        for path in earlier[:-places] if places else earlier:
            if path != self._best_target():
                remove_folder(path)

    def _is_whole(self, folder: Path) -> bool:
        """False for a folder that differs from its manifest. It is set aside, and the user is told."""
        damage = find_damage(folder)
        if damage is None:
            return True
        was_best = self._best_target() == folder
        self._log(f"{folder} is damaged: {damage}. It is kept as {set_aside(folder).name} and not used")
        if was_best:
            self._best_link.unlink()
            self._log("It was the best evaluated checkpoint: there is none until a better evaluation")
        return False

    def _on_main(self, work: Callable[[], T]) -> T:
        if world_size() > 1 and self._group is None:
            timeout = timedelta(seconds=self._config.distributed.timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)  # another thread uses it
        return on_main(work, self._group)


def _checkpoints(store: Path) -> list[Path]:
    """Oldest first."""
    folders = (path for path in store.glob("*") if path.is_dir() and not path.is_symlink())
    return sorted((path for path in folders if _NAME.fullmatch(path.name)), key=_order)


def check_same_run(folder: Path, config: Config, stages: Sequence[str], steps: Mapping[str, int]) -> None:
    """Raises InputError where a run's folder holds a whole checkpoint or model that is not this run's, or not what its
    name says. Damaged ones are left to `CheckpointStore`. `steps` are the stages' when the run was last started."""
    found = {path: _foreign(path, config, steps) for path in _checkpoints(folder / "checkpoints")}
    found |= {
        path: _foreign_model(path, config, stage, steps.get(stage))
        for stage in stages
        if (path := model_folder(folder, stage)).is_dir()
    }
    for path, what in found.items():
        if what and find_damage(path) is None:
            raise InputError(f"--resume: {path} is whole but not this run's: {what}. Move it elsewhere")


def _foreign(checkpoint: Path, config: Config, steps: Mapping[str, int]) -> str | None:
    """How a checkpoint differs from its name or from those that a run with `config` writes."""
    try:
        state = read_state(checkpoint)
        theirs = load_config(str(checkpoint / RUN_CONFIG_FILE))
    except InputError as error:
        return str(error)
    if (name := f"{state['stage']}-{state['step']:06d}") != checkpoint.name:
        return f"it was written as {name}"
    if state["seed"] != config.seed:
        return f"seed: {state['seed']} -> {config.seed}"
    if state["step"] > (most := steps.get(state["stage"], state["step"])):
        return f"it has {state['step']} steps, the run's {state['stage']} {most}"
    return ", ".join(differences(config, theirs)) or None


def model_folder(folder: Path, stage: str) -> Path:
    """Where a run puts the model that a stage ended with."""
    return folder / ("sft" if stage == "sft" else "model")


def made_by(config: Config, stage: str, steps: int | None) -> dict[str, Any]:
    """What the manifest of such a model says besides its files: no path, for models are given away. `steps` are those
    the stage was to have."""
    return {"made_by": {"stage": stage, "steps": steps, "config_sha256": fingerprint(config)}}


def _foreign_model(model: Path, config: Config, stage: str, steps: int | None) -> str | None:
    try:
        found = read_manifest(model).get("made_by")
    except InputError as error:
        return str(error)
    wanted = made_by(config, stage, steps)["made_by"]
    if steps is None and isinstance(found, dict):
        wanted["steps"] = found.get("steps")
    return None if found == wanted else f"its {MANIFEST} says made_by {found}, this run's has {wanted}"


def has_sharded(folder: Path) -> bool:
    """Whether `load_sharded` reads the weights and the optimizer; else `load_model` and `load_optimizer` do."""
    return (folder / SHARDED).is_dir()


def load_sharded(folder: Path, model: CarftModel, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put weights and AdamW moments of a sharded checkpoint into a model, sharded over any number of ranks or plain.

    With LoRA the checkpoint has adapters and heads only: the model holds the weights the stage began with.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(folder / SHARDED))
    saved = reader.read_metadata().state_dict_metadata
    tensors = {f"model.{name}": tensor for name, tensor in trained_tensors(model).items()}
    for name, parameter in model.named_parameters():
        if optimizer is not None and f"optimizer.{name}.exp_avg" in saved:
            state = {"step": torch.zeros((), device=parameter.device)}
            state |= {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            optimizer.state[parameter] = state
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    if missing := sorted(tensors.keys() - saved.keys()):
        raise InputError(f"{folder / SHARDED}: {missing[0]} is missing: it is a checkpoint of another model")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=world_size() == 1)


def load_optimizer(folder: Path, model: CarftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put the AdamW moments of a plain checkpoint back, by parameter name; each rank takes its part of them."""
    tensors = load_file(folder / OPTIMIZER_FILE)
    for name, parameter in model.named_parameters():
        if f"{name}/step" not in tensors:
            continue
        prefix = f"{name}/"
        saved = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
        state = state_from_tensors(saved, parameter)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            state |= {key: distribute_tensor(state[key], mesh, placements, src_data_rank=None) for key in MOMENTS}
        optimizer.state[parameter] = state


def load_trained(folder: Path, model: CarftModel, optimizer: torch.optim.Optimizer) -> None:
    """What `load_model` does not read of a checkpoint: the optimizer, and sharded weights."""
    if has_sharded(folder):
        load_sharded(folder, model, optimizer)
    else:
        load_optimizer(folder, model, optimizer)


def read_state(folder: Path) -> dict[str, Any]:
    """trainer_state.json; `model_path` as a path from here. Raises InputError for another version's, or garbage."""
    state = read_json_object(folder / STATE_FILE)
    if state.get("format") != FORMAT:
        raise InputError(f"{folder / STATE_FILE}: format {state.get('format')!r}; this version reads {FORMAT}")
    for name, kind in {"stage": str, "step": int, "seed": int, "model_path": str}.items():
        if type(value := state.get(name)) is not kind:
            raise InputError(f"{folder / STATE_FILE}: {name} = {value!r}: expected a {kind.__name__}")
    if state["model_path"].startswith(os.pardir):
        state["model_path"] = os.path.normpath(folder.resolve().parent / state["model_path"])
    return state


def _portable(model_path: str, store: Path) -> str:
    """A folder of the same run, which may be moved, relative to the store; another folder as an absolute path."""
    if not Path(model_path).is_dir():
        return model_path  # a Hub id, or "synthetic"
    path = Path(model_path).resolve()
    return os.path.relpath(path, store.resolve()) if path.is_relative_to(store.resolve().parent) else str(path)


def _order(path: Path) -> tuple[int, int]:
    """Stage and step. Not the time of writing: clocks jump."""
    stage, step = path.name.rsplit("-", 1)
    return STAGES.index(stage), int(step)


def trained_tensors(model: CarftModel, *, keep_vars: bool = False) -> Tensors:
    """What training changes, by name: with LoRA adapters and heads, else every weight. Tied ones are in it once."""
    state = model.state_dict(keep_vars=keep_vars)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad or not model.has_adapters]
    if not model.has_adapters:
        names += [name for name, _ in model.named_buffers() if name in state]
    return {name: state[name] for name in names}


def _tensors(model: CarftModel, optimizer: torch.optim.Optimizer) -> Tensors:
    """Weights as "model.<name>", AdamW's state as "optimizer.<parameter>.<step or moment>"."""
    tensors = {f"model.{name}": tensor for name, tensor in trained_tensors(model).items()}
    for name, parameter in model.named_parameters():
        state = state_tensors(optimizer.state.get(parameter, {}))
        tensors |= {f"optimizer.{name}.{key}": x for key, x in state.items()}
    return tensors


def _write_plain(folder: Path, model: CarftModel, tensors: Tensors) -> None:
    def below(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

    assert model.heads is not None
    model.lm.save_pretrained(folder, state_dict=below("model.lm."))  # with LoRA: its adapters
    model.write_generation_config(folder)
    model.heads.save(folder, below("model.heads."))
    state = {"/".join(name.rsplit(".", 1)): x.cpu().contiguous() for name, x in below("optimizer.").items()}
    save_file(state, folder / OPTIMIZER_FILE)


def _write_description(folder: Path, model: CarftModel) -> None:
    """What a sharded checkpoint's model is built from."""
    assert model.heads is not None
    model.lm.config.save_pretrained(folder)
    model.write_generation_config(folder)
    (folder / HEADS_CONFIG).write_text(json.dumps(model.heads.description, indent=2) + "\n")


def _host_copy(tensors: Tensors) -> Tensors:
    """A copy that training does not change."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
