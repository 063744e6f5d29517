"""The LM head divided over the ranks of a process group: rank r holds some rows of the weight, all ranks have the same
hidden states and targets.

    lse = logsumexp_r lse_r,  w_r = exp(lse_r - lse),  logprob = logprob_o + log w_o,  H = sum_r w_r (H_r - log w_r)

r: a rank and what it finds with its own shard as the vocabulary, w_r: the shard's share of the probability, o: the rank
that holds the target. Each rank runs the operator on its shard; the statistics of a row go over the group in one
all-gather of 3 or 4 numbers a chunk, and are combined in the order of the ranks, so all ranks find the same numbers.
Their gradients by these formulas reach the shard's own log-prob, entropy and log-sum-exp, and d_hidden is summed over
the ranks. Source: vocabulary-parallel
cross entropy of Megatron-LM (Shoeybi et al. 2019); `loss_parallel` of torch. T tokens, V rows of this rank's shard,
D hidden size, R ranks.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from carft_kernels._row_kernels import RowGradients, RowStatistics
from carft_kernels._runtime import accumulation_dtype, check_targets, index_checks_on, to_device

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
    """int64: row of this shard; 0 where another rank has it, IGNORED or -1 (outside the vocabulary; every one where the
    ranks have different tokens)."""
    owner_T: Tensor
    """int64: rank that has the target; -1 where it is ignored."""
    rows_R: Tensor
    """int64: rows of each rank's shard."""
    absent: Tensor
    """bool []: whether no row of this shard can be chosen, since there is none or every bias is -inf."""
    group: str

    @classmethod
    def of(cls, target_T: Tensor, rows: int, bias: Tensor | None, ignore_index: int, group: str) -> "VocabShard":
        """Of whole targets, and of the number of rows of this shard (0 where one was padded) and their bias."""
        if rows == 0 or bias is None:
            absent = torch.full((), rows == 0, device=target_T.device)
        else:
            absent = (bias == -math.inf).all()
        rank, index_T, ignored_T = _ranks(group).rank(), target_T.long(), target_T == ignore_index
        # exact, and another one for the same tokens in another order
        checksum_1 = (index_T * torch.arange(1, 1 + len(index_T), device=index_T.device)).sum()[None]
        sizes_R3 = _gather(torch.cat([to_device([rows, len(target_T)], target_T.device), checksum_1]), group)
        rows_R, end_R = sizes_R3[:, 0].clone(), sizes_R3[:, 0].cumsum(0)
        differ = (sizes_R3[:, 1:] != sizes_R3[0, 1:]).any()
        if index_checks_on(target_T):
            if differ:
                raise ValueError(
                    f"target_T has {sizes_R3[:, 1].tolist()} elements on the ranks of group, not all with the same "
                    "values: expected the same tokens on every rank, since each has a part of the vocabulary; FSDP's "
                    "shards, where every rank has tokens of its own, have to be gathered: weight_VD.full_tensor()"
                )
            check_targets("target_T", target_T, int(end_R[-1]), ignore_index)
        owner_T = torch.bucketize(index_T, end_R, right=True).clamp(max=len(end_R) - 1)
        local_T = torch.where(owner_T == rank, index_T - (end_R[rank] - rows), 0)
        local_T.masked_fill_((index_T < 0) | (index_T >= end_R[-1]) | differ, -1).masked_fill_(ignored_T, IGNORED)
        return cls(local_T, owner_T.masked_fill_(ignored_T, -1), rows_R, absent, group)

    def combine(self, own: RowStatistics, rows: slice, unit: float) -> tuple[RowStatistics, tuple[Tensor, Tensor]]:
        """Statistics of the whole vocabulary, of those of this shard for some tokens; the log of its share, and bool
        whether it has the target, [n] each.

        Maximum and log of the sum below it stay apart (in `unit` nats): nothing cancels, however large the logits.
        """
        parts = [x.masked_fill(self.absent, -math.inf) for x in (own.top_T, own.log_total_T)]
        parts += [x.masked_fill(self.absent, 0.0) for x in (own.logprob_T, own.entropy_T) if len(x) == len(own.top_T)]
        top_RT, log_total_RT, logprob_RT, *entropy = _gather(torch.stack(parts), self.group).unbind(1)
        top_T = top_RT.amax(0)
        log_sum_RT = (top_RT - top_T + log_total_RT) * unit
        log_sum_T = log_sum_RT.logsumexp(0)
        log_share_RT = log_sum_RT - log_sum_T
        owner_T = self.owner_T[rows]
        logprob_T = (logprob_RT + log_share_RT).gather(0, owner_T.clamp(min=0)[None])[0].clamp(max=0.0)
        entropy_T = own.entropy_T
        if entropy:
            share_RT = log_share_RT.exp()
            entropy_T = torch.where(share_RT == 0, 0.0, share_RT * (entropy[0] - log_share_RT)).sum(0)
        whole = RowStatistics(logprob_T, entropy_T, top_T, log_sum_T / unit)
        whole = RowStatistics._make(x.masked_fill(owner_T < 0, 0.0) if len(x) else x for x in whole)
        rank = _ranks(self.group).rank()
        return whole, (log_share_RT[rank], owner_T == rank)

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks, in the accumulation dtype, rounded once."""
        total = x.to(accumulation_dtype(x), copy=True)
        if x.numel():
            dist.all_reduce(total, group=_ranks(self.group))
        return total.to(x.dtype)


def own_gradients(
    given: RowGradients, own_entropy_T: Tensor, entropy_T: Tensor, log_share_T: Tensor, here_T: Tensor
) -> RowGradients:
    """Of the shard's own log-prob, entropy and log-sum-exp; of those of the whole vocabulary, see `combine`."""
    d_logprob_T, d_entropy_T, d_lse_T = given
    share_T = log_share_T.exp()
    d_T = -d_logprob_T if d_lse_T is None else d_lse_T - d_logprob_T
    if d_entropy_T is not None:
        d_T = d_T + d_entropy_T * (own_entropy_T - log_share_T - entropy_T)
        d_entropy_T = d_entropy_T * share_T
    d_own_T = torch.where(here_T, d_logprob_T, 0.0)
    return RowGradients(d_own_T, d_entropy_T, d_own_T + torch.where(share_T == 0, 0.0, share_T * d_T))


def own_shard(name: str, x: Any, group: dist.ProcessGroup | None) -> Any:
    """This rank's rows of a DTensor that is divided over `group`; anything else as it is."""
    if group is None:
        return x
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group = {group!r}: expected a torch.distributed.ProcessGroup that this process belongs to, or None"
        )
    if not hasattr(x, "full_tensor"):
        return x
    mesh, ranks = x.device_mesh.mesh.tolist(), dist.get_process_group_ranks(group)
    if mesh != ranks or not x.placements[0].is_shard(0):
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements} over ranks {mesh}: with a group expected "
            f"(Shard(dim=0),) over its ranks, {ranks}"
        )
    return x.to_local()
