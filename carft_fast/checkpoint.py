"""Checkpoints that a kill cannot spoil: written beside, made durable, then renamed into place.

A checkpoint is a plain Hugging Face model folder (with LoRA: the adapters, as peft saves them) with the two heads,
`optimizer.safetensors` (AdamW moments by parameter
name) and `trainer_state.json`. Data order, dropout-free training, sampling seeds and the learning rate are
functions of (seed, stage, step), so seed and step are all the random and scheduler state there is.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from carft_fast.errors import InputError
from carft_fast.files import TEMPORARY, remove_folder, write_folder
from carft_fast.model import CarftModel

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
FORMAT = 1


class CheckpointStore:
    """`folder/<stage>-<step>` folders, `folder/best` a link to the best evaluated one."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self._folder = folder
        self._keep_last = keep_last

    def save(
        self,
        stage: str,
        step: int,
        model: CarftModel,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        best: bool = False,
    ) -> Path:
        """Write the state after `step` steps of `stage`; `best` also points the best link at it."""

        def write(folder: Path) -> None:
            model.save_trained(folder)
            tokenizer.save_pretrained(folder)
            save_file(_optimizer_tensors(model, optimizer), folder / OPTIMIZER_FILE)
            state = {"format": FORMAT, "stage": stage, "step": step, "seed": seed}
            (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")

        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"{stage}-{step:06d}"
        if not target.exists():  # the same step of the same run holds the same bits
            write_folder(target, write)
        if best:
            link = self._folder / f"{TEMPORARY}best"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            os.replace(link, self._folder / "best")
        self._rotate(newest=target)
        return target

    def latest(self, stage: str) -> tuple[Path, int] | None:
        """The newest checkpoint of a stage and the number of steps it has done."""
        found = [(path, _read_state(path)) for path in self._all() if path.name.startswith(f"{stage}-")]
        if not found:
            return None
        path, state = max(found, key=lambda item: item[1]["step"])
        return path, int(state["step"])

    def best(self, stage: str) -> Path | None:
        """The best evaluated checkpoint, where it is one of this stage."""
        link = self._folder / "best"
        target = self._folder / os.readlink(link) if link.is_symlink() else None
        return target if target is not None and target.name.startswith(f"{stage}-") else None

    def clean(self) -> None:
        """Remove what a killed write left behind."""
        for path in self._folder.parent.rglob(f"{TEMPORARY}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _all(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(p for p in self._folder.iterdir() if (p / STATE_FILE).is_file() and not p.is_symlink())

    def _rotate(self, newest: Path) -> None:
        link = self._folder / "best"
        best = (self._folder / os.readlink(link)) if link.is_symlink() else None
        by_age = sorted(self._all(), key=lambda path: path.stat().st_mtime_ns)
        for path in by_age[: -self._keep_last]:
            if path not in (best, newest):
                remove_folder(path)


def load_optimizer(folder: Path, model: CarftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put saved AdamW moments back, by parameter name."""
    tensors = load_file(folder / OPTIMIZER_FILE)
    for name, parameter in model.named_parameters():
        state: dict[str, torch.Tensor] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (saved := tensors.get(f"{name}/{key}")) is not None:
                # clone: memory of torch's own allocator has the alignment an uninterrupted run has, so kernels take
                # the same path and the bits agree
                state[key] = saved.clone().to(parameter.device if key != "step" else saved.device)
        if state:
            optimizer.state[parameter] = state


def _optimizer_tensors(model: CarftModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _read_state(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / STATE_FILE).read_text())
    if state.get("format") != FORMAT:
        raise InputError(f"{folder / STATE_FILE}: format {state.get('format')!r}; this version reads {FORMAT}")
    return state
