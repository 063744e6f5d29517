"""Value and embedding head against the published code's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from carft_fast.models.heads import CarftHeads

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "visible" / "value_head.safetensors"


@pytest.mark.parametrize(("version", "value_head"), [("v1", "separate"), ("v2", "shared")])
def test_heads_of_the_published_code(version: str, value_head: str) -> None:
    if not GOLDEN.is_file():
        pytest.skip(f"reference vectors {GOLDEN} do not exist")
    case = f"head0_{version}/"
    a = {name.removeprefix(case): x for name, x in load_file(GOLDEN).items() if name.startswith(case)}
    hidden = a["h"].flatten(0, 1).requires_grad_()
    heads = CarftHeads(hidden.shape[1], 64, value_head)
    heads.load_state_dict({name: a[name] for name in heads.state_dict()})
    value, embedding = heads.value(hidden), heads.embed(hidden)
    torch.testing.assert_close(value, a["value"].flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embedding, a["emb"].flatten(0, 1), rtol=1e-5, atol=1e-6)
    loss = (value * a["up_value"].flatten()).sum() + (embedding * a["up_emb"].flatten(0, 1)).sum()
    d_hidden, d_proj = torch.autograd.grad(loss, (hidden, heads.proj.weight))
    torch.testing.assert_close(d_hidden, a["grad_h"].flatten(0, 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(d_proj, a["grad_proj_weight"], rtol=1e-4, atol=1e-6)
