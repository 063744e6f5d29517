"""Weights are loaded from a model's own safetensors files only: unpickling a file can run any code that it holds."""

import os
from pathlib import Path
from typing import Any

from carft_fast.core import InputError, read_json_object

PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CONFIG = "config.json"
MODEL, MODEL_INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"


def check_safetensors(folder: Path, *, heads: tuple[str, str]) -> None:
    """Raises InputError when model, adapter or heads of a local model folder are missing, are no safetensors, or are
    files of another place.

    `heads`: the file names of their description and their weights.
    """
    _check_config(str(folder), read_json_object(folder / CONFIG))
    if (folder / MODEL).is_file():
        _check_inside(folder, MODEL)
    else:
        _check_shards(folder)
    for description, weights in (("adapter_config.json", ADAPTER), heads):
        if (folder / description).is_file():
            if not (folder / weights).is_file():
                raise _refusal(folder, weights)
            _check_inside(folder, weights)


def _check_config(path: str, config: dict[str, Any]) -> None:
    """transformers would load the file that this entry names, an index of pickled shards included."""
    if (name := config.get("transformers_weights")) is not None:
        raise InputError(
            f'model.path = "{path}": its {CONFIG} has transformers_weights = {name!r}; weights are loaded from {MODEL} '
            f"or the shards of {MODEL_INDEX} only: remove the entry"
        )


def _check_inside(folder: Path, name: str) -> None:
    """A link may lead to a file of the folder, or of the Hub's cache that the folder is a snapshot in."""
    here, place = folder.resolve(), (folder / name).resolve()
    in_cache = here.parent.name == "snapshots" and place.parent == here.parents[1] / "blobs"
    if not (in_cache or place.is_relative_to(here)):
        raise InputError(
            f'model.path = "{folder}": {name} is a link to {place}, which is not in the folder: put the file there'
        )


def _check_shards(folder: Path) -> None:
    if not (folder / MODEL_INDEX).is_file():
        raise _refusal(folder, MODEL)
    for name in _shards(folder / MODEL_INDEX):
        if not name.endswith(".safetensors"):
            raise _refusal(folder, MODEL, f"{name} in {MODEL_INDEX}")
        if not (folder / name).is_file():
            raise InputError(f'model.path = "{folder}": {name} is missing, which {MODEL_INDEX} names')
        _check_inside(folder, name)


def _shards(index: Path) -> list[str]:
    """The files that an index names. transformers would read them wherever they are, and unpickle some."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map = {str(weight_map)[:60]}: expected the file of each weight")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", os.pardir) or not name.isprintable():
            raise InputError(f"{index}: names {str(name)[:200]!r}; allowed are files in the same folder")
    return sorted(set(weight_map.values()))


def _refusal(folder: Path, wanted: str, found: str = "") -> InputError:
    files = sorted({path.name for pattern in PICKLED for path in folder.glob(pattern)})
    message = f'model.path = "{folder}": no {wanted}; weights are loaded from safetensors files only'
    if not (found or files):
        return InputError(message)
    if wanted == MODEL:
        code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
        code += f".save_pretrained('{folder}')"
    else:
        code = "import torch; from safetensors.torch import save_file; "
        code += f"save_file(torch.load('{folder / files[0]}', weights_only=True), '{folder / wanted}')"
    return InputError(
        f"{message}, found {found or ', '.join(files[:3])}: pickled weights can run code when they are read. If you "
        f'trust them, convert them once: python -c "{code}"'
    )


def check_hub(path: str, revision: str | None) -> None:
    """Raises InputError for a Hub id without a model, or an adapter's weights, in safetensors: transformers would load
    pickled ones. The model that an adapter is for is looked at, too.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    _check_hub_model(path, revision)
    if (adapter := find_adapter_config_file(path, revision=revision)) is None:
        return
    if not _cached(path, ADAPTER, revision):
        raise _hub_refusal(path, ADAPTER)
    base = read_json_object(Path(adapter)).get("base_model_name_or_path")
    if not isinstance(base, str) or Path(base).exists():
        raise InputError(
            f'model.path = "{path}": its adapter_config.json has base_model_name_or_path = {base!r}: expected a Hub id'
        )
    if base != path:
        _check_hub_model(base, None)


def _check_hub_model(path: str, revision: str | None) -> None:
    if config := _cached(path, CONFIG, revision):
        _check_config(path, read_json_object(Path(config)))
    index = _cached(path, MODEL_INDEX, revision)
    shards = _shards(Path(index)) if index else []
    if not (_cached(path, MODEL, revision) or (shards and all(name.endswith(".safetensors") for name in shards))):
        raise _hub_refusal(path, MODEL)


def _cached(path: str, name: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file

    return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)


def _hub_refusal(path: str, wanted: str) -> InputError:
    return InputError(
        f'model.path = "{path}": no {wanted} on the Hub; weights are loaded from safetensors files only: pickled '
        "weights can run code when they are read. Look for another revision, or convert them in a folder of your own"
    )
