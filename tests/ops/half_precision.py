"""What plain torch does in half precision, apart from the rest of an expression."""

from typing import Any

import torch
from torch import Tensor


class ProductIn(torch.autograd.Function):
    """a @ c.T in float32, with the gradients of that product in the dtype that a and c came in."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(a, c)
        ctx.dtype = dtype
        return a @ c.T

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        a, c, d = (x.to(ctx.dtype) for x in (*ctx.saved_tensors, d))
        return (d @ c).float(), (d.T @ a).float(), None
