"""A checkpoint as an ordinary model folder for transformers or vLLM, made in one process on the CPU."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.logging import disable_progress_bar

from carft_fast.config import Config, load_config
from carft_fast.core import MANIFEST, InputError, find_damage, read_manifest, write_folder
from carft_fast.models import HEADS_CONFIG, CarftHeads, CarftModel, load_model
from carft_fast.training import hub
from carft_fast.training.checkpoint import (
    RUN_CONFIG_FILE,
    RUN_FILES,
    STATE_FILE,
    has_sharded,
    load_sharded,
    made_by,
    read_state,
)


def export_checkpoint(checkpoint: Path, folder: Path, *, push_to: str | None = None, public: bool = False) -> None:
    """Write `folder` all or nothing. Raises InputError for a damaged checkpoint, or a folder that is not empty.

    `push_to`: also upload it, with a model card, to this repository of the Hub; InputError before anything is written
    where that cannot be, TrainingError where the upload fails.
    """
    _check_new(folder)
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such folder")
    if not any((checkpoint / name).is_file() for name in (STATE_FILE, MANIFEST)):
        raise InputError(
            f"{checkpoint}: no checkpoint ({STATE_FILE} is missing); a run has them in checkpoints/<stage>-<step>"
        )
    if damage := find_damage(checkpoint):
        raise InputError(f"{checkpoint}: damaged: {damage}")
    if not (checkpoint / STATE_FILE).is_file():
        raise InputError(f"{checkpoint}: this is an exported model, not a checkpoint")
    state = read_state(checkpoint)
    if push_to is not None:
        hub.check_push(push_to)
    config = load_config(str(checkpoint / RUN_CONFIG_FILE))

    def write(target: Path) -> None:
        for name in read_manifest(checkpoint)["files"]:  # a plain checkpoint is a model folder with more files
            if name.partition("/")[0] not in RUN_FILES and not name.startswith("adapter_"):
                _copy(checkpoint, target, name)
        if config.lora.rank or has_sharded(checkpoint):
            _load_trained(config, state["model_path"], checkpoint).save(target)
        if push_to is not None:
            card = hub.model_card(config, state["stage"], state["step"], checkpoint.resolve().parents[1], push_to)
            (target / hub.CARD).write_text(card, encoding="utf-8")

    disable_progress_bar()
    write_folder(folder, write, made_by(config, state["stage"], state["step"]))
    if push_to is not None:
        hub.push(folder, push_to, public=public)


def copy_model(model: Path, folder: Path) -> None:
    """Copy an exported model, all or nothing. Raises InputError for a damaged one, or a folder that is not empty."""
    _check_new(folder)
    if damage := find_damage(model):
        raise InputError(f"{model}: damaged: {damage}")

    def write(target: Path) -> None:
        for name in read_manifest(model)["files"]:
            _copy(model, target, name)

    write_folder(folder, write)


def _copy(source: Path, target: Path, name: str) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target / name)


def _check_new(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a new or empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; give a new or empty folder")


def _load_trained(config: Config, start: str, checkpoint: Path) -> CarftModel:
    """With LoRA the weights that the stage began with, and the checkpoint's adapters. Else its shards, put together."""
    sharded, cpu = has_sharded(checkpoint), torch.device("cpu")
    if config.lora.rank:
        plain: dict[str, Any] = {"device": "cpu", "impl": "padded", "attention": "eager"}
        plain |= {"compile": False, "gradient_checkpointing": False}
        config = config.model_copy(update={"model": config.model.model_copy(update=plain)})
        model = load_model(config, start, cpu, heads=True, trained=None if sharded else checkpoint)
    else:
        lm_config = AutoConfig.from_pretrained(checkpoint)
        lm = AutoModelForCausalLM.from_config(lm_config, attn_implementation="eager", dtype=torch.float32).eval()
        if (checkpoint / GENERATION_CONFIG_NAME).is_file():
            lm.generation_config = GenerationConfig.from_pretrained(checkpoint)
        heads = CarftHeads(**json.loads((checkpoint / HEADS_CONFIG).read_text()))
        model = CarftModel(lm, heads, getattr(torch, config.model.compute_dtype), packs=False)
    if sharded:
        load_sharded(checkpoint, model)
    return model
