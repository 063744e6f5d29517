"""GPUs a plan can be made for, from the vendor's data sheets, and what work takes on them. Nothing here is measured."""

from typing import NamedTuple

from carft_fast.core import InputError
from carft_fast.models import Work

MATMUL_SHARE, MEMORY_SHARE = 0.4, 0.8
"""Of the peak FLOP/s and of the memory bandwidth that work is taken to reach."""
USABLE = 0.9
"""Of the memory; a tenth is left to CUDA, kernels' own memory, NCCL and fragmentation."""


class Gpu(NamedTuple):
    title: str
    mebibytes: int
    """Memory, as nvidia-smi shows it."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    bandwidth: float
    """Bytes of memory a second."""
    capability: tuple[int, int]

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.mebibytes << 20

    @property
    def free_rows(self) -> float:
        """Tokens that a forward of bfloat16 weights computes in the time that reading the weights takes.

        A weight is two bytes, and two FLOPs a token.
        """
        return self.flops * MATMUL_SHARE / (self.bandwidth * MEMORY_SHARE)

    def sequences_for_drafts(self, wasted_per_token: float) -> float:
        """Sequences in flight from which drafts cost more than they save, however many tokens a forward yields.

        A forward checks `1 + wasted_per_token` tokens for each token of a completion. Beyond `free_rows` of them its
        time grows as they do, and a token costs more than without drafts once `1 + wasted_per_token` times the
        sequences do.
        """
        return self.free_rows / (1 + wasted_per_token)

    def draft_gain(self, sequences: int, tokens_per_forward: float, wasted_per_token: float) -> float:
        """How many times faster `sequences` decode with drafts; below 1 slower."""

        def time(rows: float) -> float:
            return max(1.0, rows / self.free_rows)

        checked = sequences * tokens_per_forward * (1 + wasted_per_token)
        return tokens_per_forward * time(sequences) / time(checked)

    def seconds(self, work: Work) -> float:
        """The larger of what its FLOPs and its bytes take."""
        return max(work.flops / (self.flops * MATMUL_SHARE), work.bytes / (self.bandwidth * MEMORY_SHARE))


GPUS = {
    "a100-40": Gpu("A100-40GB", 40960, 312e12, 1.56e12, (8, 0)),
    "a100-80": Gpu("A100-80GB", 81920, 312e12, 2.04e12, (8, 0)),
    "h100-80": Gpu("H100-SXM", 81559, 989e12, 3.35e12, (9, 0)),
    "h200-141": Gpu("H200-SXM", 143771, 989e12, 4.8e12, (9, 0)),
    "b200-180": Gpu("B200", 183359, 2250e12, 8.0e12, (10, 0)),
    "l40s-48": Gpu("L40S", 46068, 362e12, 0.864e12, (8, 9)),
    "rtx4090-24": Gpu("RTX 4090", 24564, 165e12, 1.01e12, (8, 9)),
}


def find_gpu(name: str) -> Gpu:
    """Raises InputError for one that is not in the table."""
    if name not in GPUS:
        raise InputError(f'gpu = "{name}": allowed are {", ".join(GPUS)}')
    return GPUS[name]
