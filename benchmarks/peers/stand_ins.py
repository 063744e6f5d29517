"""Importing the published trainer, which was written for older and absent packages, without changing a line of it.

What it computes a step with is given below in the meaning its libraries had; anything else it imports that is not
there becomes a name that raises when it is used.
"""

import ast
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased."""
    count = mask.sum()
    return masked_mean((values - masked_mean(values, mask)).square(), mask) * count / (count - 1)


def masked_whiten(values: Tensor, mask: Tensor) -> Tensor:
    return (values - masked_mean(values, mask)) * torch.rsqrt(masked_var(values, mask) + 1e-8)


def logprobs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def lfilter(b: list[float], a: list[float], x: np.ndarray) -> np.ndarray:
    """y[t] = b[0] x[t] - a[1] y[t - 1], the one filter that is used."""
    result, last = np.zeros_like(x), 0.0
    for t, value in enumerate(x):
        last = result[t] = b[0] * value - a[1] * last
    return result


class CausalLMWithValueHead(nn.Module):
    """ReFT's: float32 logits, no loss, values [B, L] = u.h + c."""

    def __init__(self, lm: Any, value: nn.Linear) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = lm, value

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, None, Tensor]:
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return output.logits.float(), None, self.v_head(output.hidden_states[-1].float()).squeeze(-1)


class CausalLMWithHeads(nn.Module):
    """CARFT's: float32 logits, no loss, values [B, L] = u.relu(e) + c, embeddings e [B, L, 64]."""

    def __init__(self, lm: Any, projection: nn.Linear, value: nn.Linear) -> None:
        super().__init__()
        self.pretrained_model, self.projection, self.v_head = lm, projection, value

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        embedding = self.projection(output.hidden_states[-1].float())
        return output.logits.float(), None, self.v_head(embedding.relu()).squeeze(-1), embedding


@contextmanager
def unwrapped(model: Any, *_: Any, **__: Any) -> Iterator[Any]:
    yield model


def nothing(*_: Any, **__: Any) -> None:
    pass


STAND_INS: dict[str, dict[str, Any]] = {
    "trl": {"AutoModelForCausalLMWithValueHead": CausalLMWithValueHead},
    "trl.core": {
        "masked_mean": masked_mean,
        "masked_var": masked_var,
        "masked_whiten": masked_whiten,
        "logprobs_from_logits": logprobs_from_logits,
    },
    "trl.models": {},
    "trl.models.modeling_base": {},
    "trl.models.utils": {"unwrap_model_for_generation": unwrapped},
    "trl.trainer": {},
    "trl.trainer.utils": {"selective_log_softmax": logprobs_from_logits},
    "scipy": {},
    "scipy.signal": {"lfilter": lfilter},
    "deepspeed": {},
    "deepspeed.accelerator": {"get_accelerator": lambda: SimpleNamespace(empty_cache=nothing)},
    "datasets": {},
    "pandas": {},
    "wandb": {},
    "prettytable": {},
    "pebble": {},
    "sympy": {},
}


def _absent(name: str) -> type:
    def use(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{name} is not installed and the step was not expected to use it")

    return type(name, (), {"__init__": use})  # a class may also be derived from and stand in annotations


def _put_in_place() -> None:
    for name, contents in STAND_INS.items():
        module = sys.modules[name] = ModuleType(name)
        module.__path__, module.__spec__ = [], ModuleSpec(name, None)
        vars(module).update(contents)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _imports(folder: Path, name: str, seen: set[str]) -> Iterator[ast.ImportFrom]:
    """`from ... import ...` of a module of the folder and of the folder's modules that it imports."""
    file = folder / f"{name.replace('.', '/')}.py"
    if name in seen or not file.is_file():
        return
    seen.add(name)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _imports(folder, alias.name, seen)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node
            yield from _imports(folder, node.module, seen)


def import_published(folder: Path, name: str) -> ModuleType:
    """Module `name` of `folder`, with what it and the folder's own modules import."""
    wanted: dict[str, list[str]] = {}
    for node in _imports(folder, name, set()):
        if node.module and node.module.partition(".")[0] in (*STAND_INS, "transformers"):
            wanted.setdefault(node.module, []).extend(alias.name for alias in node.names)
    for module_name, names in wanted.items():  # first, since they look round for the others
        if module_name.startswith("transformers"):
            module = importlib.import_module(module_name)
            _ = [getattr(module, attribute, None) for attribute in names]
    before = {stand_in: sys.modules.get(stand_in) for stand_in in STAND_INS}
    _put_in_place()
    added: list[tuple[ModuleType, str]] = []
    for module_name, names in wanted.items():
        module = importlib.import_module(module_name)
        for attribute in names:
            if not hasattr(module, attribute):
                setattr(module, attribute, _absent(f"{module_name}.{attribute}"))
                added.append((module, attribute))
    sys.path.insert(0, str(folder))
    module = importlib.import_module(name)
    for place, attribute in added:  # the trainer holds what it needs; others may want the real ones
        delattr(place, attribute)
    for stand_in, real in before.items():
        if real is None:
            del sys.modules[stand_in]
        else:
            sys.modules[stand_in] = real
    return module
