"""The LM head divided over the ranks of a process group: rank r holds some rows of the weight, all ranks have the same
hidden states and targets.

    lse = logsumexp_r lse_r,  w_r = exp(lse_r - lse),  logprob = logprob_o + log w_o,  H = sum_r w_r (H_r - log w_r)

r: a rank and what it finds with its own shard as the vocabulary, w_r: the shard's share of the probability, o: the rank
that holds the target. Each rank runs the operator on its shard; the statistics of a row go over the group in one
all-gather of 3 or 4 numbers, and are combined in the order of the ranks, so all ranks find the same numbers. Backward:
the gradients of these formulas reach the shard's own log-prob, entropy and log-sum-exp. Source: vocabulary-parallel
cross entropy of Megatron-LM (Shoeybi et al. 2019); `loss_parallel` of torch. T tokens, V rows of this rank's shard,
D hidden size, R ranks.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from carft_kernels._runtime import LN2, accumulation_dtype, check_targets, given_gradients, index_checks_on, to_device

IGNORED = -100
"""The target, within a shard, of a token that takes no part."""


def combine_shards_reference(
    logprob_RT: Tensor, entropy_RT: Tensor, lse_RT: Tensor, owner_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The obvious expression: log-prob, entropy and log-sum-exp [T] of what every shard found by itself."""
    log_share_RT = lse_RT.log_softmax(0)
    share_RT = log_share_RT.exp()
    logprob_T = (logprob_RT + log_share_RT).gather(0, owner_T[None])[0]
    return logprob_T, (share_RT * (entropy_RT - log_share_RT)).sum(0), lse_RT.logsumexp(0)


def _ranks(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]


def _gather(x: Tensor, group: str) -> Tensor:
    """[R, ...] of every rank's x."""
    ranks = _ranks(group)
    every = x.new_empty(ranks.size(), *x.shape)
    if x.numel():
        dist.all_gather(list(every.unbind(0)), x, group=ranks)
    return every


class VocabShard(NamedTuple):
    """A rank's part of the vocabulary, and where the targets are."""

    target_T: Tensor
    """int64: row of this shard; 0 where another rank has it, IGNORED or -1 (outside the vocabulary)."""
    owner_T: Tensor
    """int64: rank that has the target; -1 where it is ignored."""
    rows_R: Tensor
    """int64: rows of each rank's shard."""
    absent: Tensor
    """bool []: whether no row of this shard can be chosen, since there is none or every bias is -inf."""
    group: str

    @classmethod
    def of(cls, target_T: Tensor, rows: int, bias: Tensor | None, ignore_index: int, group: str) -> "VocabShard":
        """Of whole targets, and of the number of rows of this shard and their bias."""
        if rows == 0 or bias is None:
            absent = torch.full((), rows == 0, device=target_T.device)
        else:
            absent = (bias == -math.inf).all()
        local_T, owner_T, rows_R = _shard_targets(target_T, rows, ignore_index, group)
        return cls(local_T, owner_T, rows_R, absent, group)

    def combine(
        self, logprob_N: Tensor, entropy_N: Tensor, top_N: Tensor, log_total_N: Tensor, rows: slice, base_2: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See _combine; of some tokens."""
        return _combine(logprob_N, entropy_N, top_N, log_total_N, self.owner_T[rows], self.absent, base_2, self.group)

    def gradients(
        self,
        d_logprob_N: Tensor,
        d_entropy_N: Tensor | None,
        d_lse_N: Tensor | None,
        own_entropy_N: Tensor,
        entropy_N: Tensor,
        log_share_N: Tensor,
        rows: slice,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See _own_gradients; of some tokens."""
        here_N = self.owner_T[rows] == _ranks(self.group).rank()
        return _own_gradients(d_logprob_N, d_entropy_N, d_lse_N, own_entropy_N, entropy_N, log_share_N, here_N)


def _combine(
    logprob_T: Tensor,
    entropy_T: Tensor,
    top_T: Tensor,
    log_total_T: Tensor,
    owner_T: Tensor,
    absent: Tensor,
    base_2: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy (empty if it is), log-sum-exp, and log of this shard's share, of this shard's statistics.

    Maximum and log of the sum below it stay apart, in base 2 if a kernel found them: nothing cancels, however large the
    logits.
    """
    unit = LN2 if base_2 else 1.0
    parts = [x.masked_fill(absent, -math.inf) for x in (top_T, log_total_T)]
    parts += [x.masked_fill(absent, 0.0) for x in (logprob_T, entropy_T) if len(x) == len(top_T)]
    top_RT, log_total_RT, logprob_RT, *entropy = _gather(torch.stack(parts), group).unbind(1)
    top_T = top_RT.amax(0)
    log_sum_RT = (top_RT - top_T + log_total_RT) * unit
    log_sum_T = log_sum_RT.logsumexp(0)
    log_share_RT = log_sum_RT - log_sum_T
    ignored_T = owner_T < 0
    logprob_T = (logprob_RT + log_share_RT).gather(0, owner_T.clamp(min=0)[None])[0].clamp(max=0.0)
    lse_T = top_T * unit + log_sum_T
    found = [logprob_T, lse_T]
    if entropy:
        share_RT = log_share_RT.exp()
        found.append(torch.where(share_RT == 0, 0.0, share_RT * (entropy[0] - log_share_RT)).sum(0))
    logprob_T, lse_T, *entropy = (x.masked_fill_(ignored_T, 0.0) for x in found)
    own = log_share_RT[_ranks(group).rank()].clone()
    return logprob_T, entropy[0] if entropy else torch.empty_like(entropy_T), lse_T, own


def _own_gradients(
    d_logprob_T: Tensor,
    d_entropy_T: Tensor | None,
    d_lse_T: Tensor | None,
    own_entropy_T: Tensor,
    entropy_T: Tensor,
    log_share_T: Tensor,
    here_T: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of the shard's own log-prob, entropy and log-sum-exp; of those of the whole vocabulary.

    here_T: whether the shard has the target.
    """
    share_T = log_share_T.exp()
    d_T = -d_logprob_T if d_lse_T is None else d_lse_T - d_logprob_T
    if d_entropy_T is not None:
        d_T = d_T + d_entropy_T * (own_entropy_T - log_share_T - entropy_T)
        d_entropy_T = d_entropy_T * share_T
    d_own_T = torch.where(here_T, d_logprob_T, 0.0)
    return d_own_T, d_entropy_T, d_own_T + torch.where(share_T == 0, 0.0, share_T * d_T)


@torch.library.custom_op("carft::combine_shards", mutates_args=())
def _combine_shards(
    logprob_T: Tensor,
    entropy_T: Tensor,
    lse_T: Tensor,
    top_T: Tensor,
    log_total_T: Tensor,
    owner_T: Tensor,
    absent: Tensor,
    base_2: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See _combine. `lse_T` is that of the last two, and what the gradient reaches."""
    return _combine(logprob_T, entropy_T, top_T, log_total_T, owner_T, absent, base_2, group)


@_combine_shards.register_fake
def _(logprob_T: Tensor, entropy_T: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprob_T, lse_T, log_share_T = (torch.empty_like(logprob_T) for _ in range(3))
    return logprob_T, torch.empty_like(entropy_T), lse_T, log_share_T


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, own_entropy_T, _, _, _, owner_T, *_, ctx.group = inputs
    _, entropy_T, _, log_share_T = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(log_share_T)
    ctx.save_for_backward(own_entropy_T, entropy_T, log_share_T, owner_T)


def _autograd(
    ctx: Any, d_logprob_T: Tensor | None, d_entropy_T: Tensor | None, d_lse_T: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    own_entropy_T, entropy_T, log_share_T, owner_T = ctx.saved_tensors
    gradients = _own_gradients(
        *given_gradients(d_logprob_T, d_entropy_T, d_lse_T, log_share_T),
        own_entropy_T,
        entropy_T,
        log_share_T,
        owner_T == _ranks(ctx.group).rank(),
    )
    return *gradients, *([None] * 6)


_combine_shards.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("carft::shard_targets", mutates_args=())
def _shard_targets(target_T: Tensor, rows: int, ignore_index: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first three fields of VocabShard, of whole targets and this shard's number of rows."""
    sizes_R2 = _gather(to_device([rows, len(target_T)], target_T.device), group)
    rows_R, end_R = sizes_R2[:, 0].clone(), sizes_R2[:, 0].cumsum(0)
    if index_checks_on(target_T):
        tokens = sizes_R2[:, 1].tolist()
        if len({*tokens}) > 1:
            raise ValueError(f"target_T has {tokens} elements on the ranks of group: expected the same on every rank")
        check_targets("target_T", target_T, int(end_R[-1]), ignore_index)
    rank, index_T, ignored_T = _ranks(group).rank(), target_T.long(), target_T == ignore_index
    owner_T = torch.bucketize(index_T, end_R, right=True).clamp(max=len(end_R) - 1)
    local_T = torch.where(owner_T == rank, index_T - (end_R[rank] - rows), 0)
    local_T.masked_fill_((index_T < 0) | (index_T >= end_R[-1]), -1).masked_fill_(ignored_T, IGNORED)
    return local_T, owner_T.masked_fill_(ignored_T, -1), rows_R


@_shard_targets.register_fake
def _(target_T: Tensor, rows: int, ignore_index: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    like = target_T.new_empty(target_T.shape, dtype=torch.int64)
    return like, torch.empty_like(like), like.new_empty(_ranks(group).size())


@torch.library.custom_op("carft::sum_over_ranks", mutates_args=())
def _sum_over_ranks(x: Tensor, group: str) -> Tensor:
    """In the accumulation dtype, rounded once."""
    total = x.to(accumulation_dtype(x), copy=True, memory_format=torch.contiguous_format)
    if x.numel():
        dist.all_reduce(total, group=_ranks(group))
    return total.to(x.dtype)


@_sum_over_ranks.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


class _SumGradient(torch.autograd.Function):
    """The same tensor, whose gradient is the sum of the ranks'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return _sum_over_ranks(d, ctx.group), None


def _own_rows(name: str, x: Any, group: dist.ProcessGroup) -> Any:
    if not hasattr(x, "full_tensor"):
        return x
    mesh, ranks = x.device_mesh.mesh.tolist(), dist.get_process_group_ranks(group)
    if mesh != ranks or not x.placements[0].is_shard(0):
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements} over ranks {mesh}: with a group expected "
            f"(Shard(dim=0),) over its ranks, {ranks}"
        )
    return x.to_local()


def own_shard(weight_VD: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor | None]:
    """This rank's rows of DTensors that are divided over `group`; other tensors as they are."""
    if group is None:
        return weight_VD, bias
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group = {group!r}: expected a torch.distributed.ProcessGroup that this process belongs to, or None"
        )
    return _own_rows("weight_VD", weight_VD, group), _own_rows("bias", bias, group)


def shard_inputs(
    hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, group: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states whose gradient is summed over the ranks; weight and bias of at least one row."""
    if hidden_TD.requires_grad:
        hidden_TD = _SumGradient.apply(hidden_TD, group)
    if len(weight_VD) == 0:  # a row of zeros, which the kernels need; it is left out of every result
        weight_VD = torch.nn.functional.pad(weight_VD, (0, 0, 0, 1))
        bias = None if bias is None else torch.nn.functional.pad(bias, (0, 1))
    return hidden_TD, weight_VD, bias


def combine_shards(
    shard: VocabShard, logprob_T: Tensor, entropy_T: Tensor, lse_T: Tensor, statistics: list[Tensor], base_2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log-sum-exp of the whole vocabulary, differentiable; of the outputs of linear_logprob."""
    found = _combine_shards(logprob_T, entropy_T, lse_T, *statistics, shard.owner_T, shard.absent, base_2, shard.group)
    return found[0], found[1], found[2]
