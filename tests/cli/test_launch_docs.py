"""The commands of docs/multi_gpu.md and docs/multi_node.md: their flags are those of the programs they start."""

import re
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from carft_fast.config.toml import load_config
from carft_fast.rollout.vllm import adapter as vllm_adapter

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = "\n".join((DOCS / name).read_text() for name in ("multi_gpu.md", "multi_node.md"))


def commands(program: str) -> list[list[str]]:
    """Words of every command in a code block that starts a program, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line[line.index(program) :].split() for line in lines if program in line]


@pytest.mark.parametrize(
    ("program", "parser"),
    [("accelerate launch ", launch_command_parser()), ("torchrun ", get_args_parser())],
    ids=["accelerate", "torchrun"],
)
def test_launchers_know_their_flags(program: str, parser: object) -> None:
    known = set(parser._option_string_actions)  # type: ignore[attr-defined]
    found = commands(program)
    assert found
    for words in found:
        own = words[: words.index("-m")]
        assert [word for word in own if word.startswith("--") and word not in known] == [], words


def flags_of(words: str) -> set[str]:
    """Each flag with its value."""
    return {" ".join(part.split()) for part in (" " + words).split(" --")[1:]}


def test_a_server_started_by_hand_gets_what_carft_fast_serve_would_give(tmp_path: Path) -> None:
    config = load_config(
        None, ["rollout.engine=vllm-server", "model.compute_dtype=bfloat16", "rollout.tensor_parallel=16"]
    )
    options = vllm_adapter.engine_options(config, "cuda", dedicated=True)
    needed = flags_of(
        " ".join(vllm_adapter.server_arguments(options, tmp_path, "nccl")).replace(str(tmp_path), "MODEL")
    )
    (command,) = (" ".join(words).replace("'", "") for words in commands("vllm.entrypoints.openai.api_server"))
    defaults = {"no-enforce-eager", "gpu-memory-utilization 0.9", "seed 0", "disable-uvicorn-access-log"}
    assert defaults < needed
    assert needed - defaults < flags_of(command)
