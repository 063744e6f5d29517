"""What Triton would compile for, as a batch's length changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import carft_kernels


def test_no_length_of_a_packed_batch_compiles_a_kernel_again() -> None:
    """Divisible by 16, by 4, by nothing: every launch over tokens has the same key, backward passes included.

    masked_infonce is left out: it has rows of rollouts, not of tokens, and its masked tiles are read in vectors only
    where their number is known to be divisible.
    """
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(Path(carft_kernels.__file__).parents[1]), str(here.parents[2])])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.ops.launches", "96", "97", "100", "113"]
    run = subprocess.run(command, env=environment, cwd=here.parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first, *others = json.loads(run.stdout).values()
    assert len(first) == 15
    for other in others:
        for kernel, keys in first.items():
            assert other[kernel] == keys, kernel
