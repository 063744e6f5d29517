"""`python -m benchmarks.gpu`, unchanged, on a fake CUDA device: every part runs to its end, and nothing is computed.

    CARFT_FAKE_CUDA_SHIM=shim.so PYTHON -S tests/gpu_path/rehearse.py -m benchmarks.gpu ...

`sys.executable` is to be a script that calls this one, so that the parts' processes come here too. What a fake device
cannot do is stood in for: random numbers, compiling, a model's weights on disk and the samplers. Sizes and numbers of
rounds are cut, since each operation takes as long as a large one.
"""

import fake_cuda  # isort: split

import os
import sys
from dataclasses import replace
from typing import Any

import torch
from audit import ROOT, Audit
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 96, "vocab_size": 512}


PROMPT = 64
aten: Any = torch.ops.aten


class Rehearsal(Audit):
    """A mask of the device picks all of a vector, and of a row of a padded batch as many as `benchmarks.gpu` has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            x, mask = args[0], args[1][0]
            if mask is not None and mask.dtype == torch.bool and mask.device.type == "cuda":
                if func is not aten.index.Tensor:
                    return x.clone() if func is aten.index_put.default else x
                return x.new_empty(len(mask) * (1 if mask.ndim == 1 else PROMPT), *x.shape[mask.ndim :])
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Generator(torch.Generator):
    """Of the host, whatever device is asked for: a build without CUDA has no other."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls)


def stand_in_for_torch(audit: Audit) -> None:
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        audit.launch(self.fn.__name__, [*args, *options.values()])

    JITFunction.run = run
    FakeTensor.tolist = lambda self: audit.read_list(self)
    fake_cuda._Event.elapsed_time = lambda self, end: 1.0  # type: ignore[attr-defined]
    torch.Generator = _Generator  # type: ignore[misc]
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    torch.cuda.reset_peak_memory_stats = lambda device=None: None  # type: ignore[assignment]


def cut_sizes() -> None:
    from benchmarks import gpu
    from benchmarks.ops import cases, measure

    by = {"T": 32, "V": 64, "D": 16, "N": 2}
    loops = {"T": 32, "length": 16}
    for i, case in enumerate(cases.CASES):
        shape = {name: max(size // by[name], 2) for name, size in case.shape.items() if name in by}
        cases.CASES[i] = replace(case, shape=shape | (loops if "length" in case.shape else {}))
    checks = gpu.check_cases()
    checks = [(replace(c, shape=c.shape | loops) if "length" in c.shape else c, dtype) for c, dtype in checks]
    gpu.check_cases = lambda: checks
    measure.FEWEST = measure.MOST = 2
    gpu.ROWS, gpu.REPEATS = 8, 1


def stand_in_for_models() -> None:
    """Small ones, whose weights are made and read outside the fake mode; a sampler gives each prompt two tokens."""
    import transformers
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from carft_fast import rollout
    from carft_fast.models import load
    from carft_fast.rollout import Rollout

    config = transformers.Qwen2Config
    transformers.Qwen2Config = lambda **sizes: config(**sizes | SIZES)  # type: ignore[assignment,misc]
    save, read = PreTrainedModel.save_pretrained, load._load_lm

    def save_real(self: Any, folder: str) -> None:
        with unset_fake_temporarily(), torch.device("cpu"):
            save(AutoModelForCausalLM.from_config(self.config), folder)

    def read_real(*args: Any) -> Any:
        with unset_fake_temporarily():
            return read(*args)

    class Engine:
        def sync(self, model: Any) -> int:
            return 1

        def generate(self, prompts: Any, sampling: Any, **_: Any) -> list[Rollout]:
            return [Rollout([3, 4], [0.0, 0.0], "length", 1) for _ in prompts]

        def close(self) -> None: ...

    PreTrainedModel.save_pretrained = save_real  # type: ignore[method-assign,assignment]
    load._load_lm = read_real
    rollout.build_engine = lambda *_: Engine()  # type: ignore[assignment,return-value]


def main() -> None:
    module, sys.argv = sys.argv[2], sys.argv[2:]
    sys.executable = os.environ["CARFT_REHEARSAL_PYTHON"]
    sys.path.insert(0, str(ROOT))
    from benchmarks import gpu  # before anything that asks for carft_kernels

    assert module == gpu.__name__
    fake_cuda.install(1)
    audit = Rehearsal()
    stand_in_for_torch(audit)
    cut_sizes()
    if {"step", "lora", "rollout"} & set(sys.argv):
        stand_in_for_models()
    code: Any = 0
    with FakeTensorMode(allow_non_fake_inputs=True), audit, torch.autograd.set_multithreading_enabled(False):
        try:
            gpu.main()
        except SystemExit as stopped:
            code = stopped.code
    if audit.wrong:
        print(f"on the wrong device: {audit.wrong}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(9 if audit.wrong else code or 0)  # the interpreter's end would ask the device for what it does not have


main()
