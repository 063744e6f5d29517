"""Weights are loaded from safetensors files only: unpickling a file can run any code that it holds."""

import json
from pathlib import Path

from carft_fast.core import InputError

PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MODEL, MODEL_INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"


def check_safetensors(folder: Path, *, heads: tuple[str, str]) -> None:
    """Raises InputError when model, adapter or heads of a local model folder are missing or are no safetensors.

    `heads`: the file names of their description and their weights.
    """
    if not (folder / MODEL).is_file():
        _check_shards(folder)
    for description, weights in (("adapter_config.json", ADAPTER), heads):
        if (folder / description).is_file() and not (folder / weights).is_file():
            raise _refusal(folder, weights)


def _check_shards(folder: Path) -> None:
    if not (folder / MODEL_INDEX).is_file():
        raise _refusal(folder, MODEL)
    for name in _shards(folder / MODEL_INDEX):
        if not name.endswith(".safetensors"):
            raise _refusal(folder, MODEL, f"{name} in {MODEL_INDEX}")
        if not (folder / name).is_file():
            raise InputError(f'model.path = "{folder}": {name} is missing, which {MODEL_INDEX} names')


def _shards(index: Path) -> list[str]:
    """The files that an index names. transformers would unpickle those that are no safetensors."""
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


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
    pickled ones.
    """
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    def cached(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    wanted = MODEL
    index = cached(MODEL_INDEX)
    if cached(MODEL) or (index and all(name.endswith(".safetensors") for name in _shards(Path(index)))):
        if not find_adapter_config_file(path, revision=revision) or cached(ADAPTER):
            return
        wanted = ADAPTER
    raise InputError(
        f'model.path = "{path}": no {wanted} on the Hub; weights are loaded from safetensors files only: pickled '
        "weights can run code when they are read. Look for another revision, or convert them in a folder of your own"
    )
