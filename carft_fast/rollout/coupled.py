"""The rule by which every engine picks a token, and the noise it uses.

    token = argmax(processed logits + Gumbel noise(seed of the completion, position of the token))

The argmax is a sample of softmax(processed logits) (Gumbel-max; Maddison et al. 2014, arXiv:1411.0030). The noise is a
function of seed and position alone, so the token is one of weights, prefix, seed and position: the batch, preemption,
the engine and a guess of the token made beforehand change nothing, up to rounding of the logits.

Legend: N rows (one token each), V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Words = np.ndarray[Any, np.dtype[np.uint32]]
_Floats = np.ndarray[Any, np.dtype[np.float32]]
_CHUNK = 2**16
"""Tokens whose noise is drawn at once on the CPU: it stays in the cache."""


def processed_logits(
    logits_NV: Tensor, temperature_N: Tensor, top_k_N: Tensor | None = None, top_p_N: Tensor | None = None
) -> Tensor:
    """float32 [N, V]: logits over the temperature, -inf where top-k, then top-p cut them.

    None cuts nothing. `top_k_N` integers in 1 to V; `top_p_N` in (0, 1]: the fewest most likely tokens that together
    have that mass. Tokens as likely as the last one kept stay, so that the cut does not depend on a sorting order.
    """
    logits_NV = logits_NV.float() / temperature_N.to(torch.float32)[:, None]
    if top_k_N is None and top_p_N is None:
        return logits_NV
    width = logits_NV.shape[1] if top_k_N is None else int(top_k_N.max())
    sorted_NK = _descending(logits_NV) if width == logits_NV.shape[1] else logits_NV.topk(width).values
    if top_k_N is not None:
        least_N1 = sorted_NK.gather(1, top_k_N.long()[:, None] - 1)
        sorted_NK = sorted_NK.masked_fill(sorted_NK < least_N1, -torch.inf)
    if top_p_N is not None:
        mass_NK = sorted_NK.softmax(-1)
        before_NK = mass_NK.cumsum(-1) - mass_NK
        sorted_NK = sorted_NK.masked_fill(before_NK >= top_p_N.to(torch.float32)[:, None], -torch.inf)
    least_N1 = sorted_NK.masked_fill(sorted_NK == -torch.inf, torch.inf).amin(-1, keepdim=True)
    return logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)


def _descending(logits_NV: Tensor) -> Tensor:
    if logits_NV.device.type == "cpu":  # six times as fast as torch's sort, which keeps the order too
        return torch.from_numpy(-np.sort(-logits_NV.numpy(), axis=-1))
    return logits_NV.sort(descending=True).values


def pick(processed_NV: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """int64 [N]: the token of each row. `positions`: index of the token in its sequence, the prompt included.

    On CUDA one Triton kernel does it (never run on a GPU), with the same bits; the logarithms may differ in the last
    place.
    """
    if processed_NV.device.type == "cuda":
        from carft_fast.rollout.pick_kernel import pick_on_gpu

        return pick_on_gpu(processed_NV, seeds, positions)
    rows, vocabulary = processed_NV.shape
    token_N = np.empty(rows, np.int64)
    if vocabulary > _CHUNK // 4:
        for row, logits_V in enumerate(processed_NV.numpy()):
            token_N[row] = _pick_among_rivals(logits_V, seeds[row], positions[row])
        return torch.from_numpy(token_N)
    step = max(1, _CHUNK // vocabulary)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        noise = gumbel_noise(seeds[part], positions[part], vocabulary)
        token_N[part] = noise.add_(processed_NV[part]).numpy().argmax(-1)  # many times as fast as torch's
    return torch.from_numpy(token_N)


def _pick_among_rivals(logits_V: _Floats, seed: int, position: int) -> int:
    """One row's token, without the logarithms of most tokens.

    -log(-log(1 - u)) is at most -log(u). So no token can beat the likeliest one with its noise, `best`, unless its u is
    at most exp(logit - best).
    """
    words_V = _philox([seed], [position], len(logits_V))[0]
    likeliest = int(logits_V.argmax())
    best = logits_V[likeliest] + float(_gumbel(words_V[likeliest : likeliest + 1]))
    if not np.isfinite(best):  # NaN, or -inf alone
        return likeliest
    largest_V = np.exp(logits_V - (best - 32 * math.log(2) - 1e-3))  # as words of 32 bits, rounding allowed for
    rivals = np.flatnonzero(words_V.astype(np.float32) <= largest_V)
    return int(rivals[(logits_V[rivals] + _gumbel(words_V[rivals]).numpy()).argmax()])


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], vocabulary: int) -> Tensor:
    """float32 [N, V] of the standard Gumbel distribution.

    A row is the stream of Philox 4x64-10 (Salmon et al. 2011) with key (seed, position), a token 32 bits of it.
    """
    return _gumbel(_philox(seeds, positions, vocabulary))


def _gumbel(words: _Words) -> Tensor:
    uniform = torch.from_numpy(words.astype(np.float32))
    # in (0, 1): small numbers, which make large noise, keep their relative precision
    uniform.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _philox(seeds: Sequence[int], positions: Sequence[int], count: int) -> _Words:
    generator = np.random.Philox(key=0)
    state: Any = generator.state
    words_NK = np.empty((len(seeds), -(-count // 2)), "<u8")
    for row, key in enumerate(zip(seeds, positions, strict=True)):
        state["state"]["key"][:] = key
        generator.state = state  # the counter and the buffer of a new generator: a quarter of the time of making one
        words_NK[row] = generator.random_raw(words_NK.shape[1])
    return words_NK.view("<u4")[:, :count]
