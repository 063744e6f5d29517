"""Importing the published trainer, which was written for older and absent packages, without changing a line of it.

What it computes a step with is given below in the meaning its libraries had; anything else it imports that is not
there becomes a name that raises when it is used.
"""

import ast
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

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
    """Float32 logits, no loss, values [B, L] = u.h + c."""

    def __init__(self, lm: Any, value: nn.Linear) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = lm, value

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, None, Tensor]:
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return output.logits.float(), None, self.v_head(output.hidden_states[-1].float()).squeeze(-1)


STAND_INS: dict[str, dict[str, Any]] = {
    "trl": {"AutoModelForCausalLMWithValueHead": CausalLMWithValueHead},
    "trl.core": {
        "masked_mean": masked_mean,
        "masked_var": masked_var,
        "masked_whiten": masked_whiten,
        "logprobs_from_logits": logprobs_from_logits,
    },
    "scipy": {},
    "scipy.signal": {"lfilter": lfilter},
    "deepspeed": {},
    "wandb": {},
    "prettytable": {},
    "pebble": {},
    "sympy": {},
}


def _absent(name: str) -> Any:
    def use(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{name} is not installed and the step was not expected to use it")

    return use


def _put_in_place(stand_ins: Mapping[str, Mapping[str, Any]]) -> None:
    for name, contents in stand_ins.items():
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(contents)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def import_published(folder: Path, name: str) -> ModuleType:
    """Module `name` of `folder`, with what it and the folder's own modules import."""
    before = {stand_in: sys.modules.get(stand_in) for stand_in in STAND_INS}
    _put_in_place(STAND_INS)
    for file in [folder / f"{name}.py", *sorted((folder / "src").glob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in STAND_INS:
                module = sys.modules[node.module]
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        setattr(module, alias.name, _absent(f"{node.module}.{alias.name}"))
    sys.path.insert(0, str(folder))
    module = importlib.import_module(name)
    for stand_in, real in before.items():  # the trainer holds what it needs; others may want the real ones
        if real is None:
            del sys.modules[stand_in]
        else:
            sys.modules[stand_in] = real
    return module
