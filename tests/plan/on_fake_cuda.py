"""The peaks of a plan's step on fake CUDA tensors: tests/gpu_path's device, and nothing that a plan replaces.

CARFT_FAKE_CUDA_SHIM=shim.so python tests/plan/on_fake_cuda.py REQUESTS.json FOUND.json PROCESSES
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu_path"))
import fake_cuda  # isort: split

import json
import os

import torch
from torch._subclasses.fake_tensor import FakeTensor


def main() -> None:
    requests, answer, processes = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
    fake_cuda.install(processes)
    from triton.runtime.jit import JITFunction

    from carft_fast.plan import worker
    from carft_fast.plan.fake import Recorder

    recorder = Recorder("cuda")
    JITFunction.run = lambda *_, **__: recorder.launch()
    FakeTensor.tolist = lambda x: [0.0] * x.numel()
    worker.DEVICE = torch.device("cuda", 0)
    if processes > 1:
        worker.join(processes)
        worker.name_memory_of_fsdp(recorder)
    models = worker.install_models()
    with torch.autograd.set_multithreading_enabled(False):  # else a thread's end decides when memory is free
        answer.write_text(json.dumps([worker.run(request, recorder, models) for request in requests]))
    sys.stdout.flush()
    os._exit(0)  # the interpreter's end would ask the device for things it does not have


main()
