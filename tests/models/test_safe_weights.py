"""What is not trusted of a model: pickled weights, and Python files of its own."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import carft_fast
from carft_fast.cli import QUICKSTART_CONFIG
from carft_fast.config.sections import ModelConfig
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.data.synthetic import build_model_config, build_tokenizer
from carft_fast.models.flops import ModelCost
from carft_fast.models.load import check_weights, load_lm_config, load_model, load_tokenizer
from carft_fast.rollout.vllm import adapter as vllm_adapter

ROOT = Path(carft_fast.__file__).parents[1]

# --- weights ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights."""
    tokenizer = build_tokenizer()
    build_model_config(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        check_weights(str(folder))
    return str(error.value)


def run_as_printed(command: str) -> None:
    assert command.startswith("python -c ")
    subprocess.run(["sh", "-c", command.replace("python", sys.executable, 1)], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_are_named_with_the_command_that_converts_them(folder: Path, name: str) -> None:
    torch.save({}, folder / name)
    (folder / "optimizer.safetensors").touch()  # weights of something else
    message = refusal(folder)
    assert f"found {name}" in message
    assert "python -c" in message
    assert str(folder) in message


def test_the_command_that_is_given_converts(folder: Path) -> None:
    """Run as it is printed, on a pickled model; afterwards the folder is taken and holds the same weights."""
    lm = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    torch.save(lm.state_dict(), folder / "pytorch_model.bin")
    command = refusal(folder).partition("convert them once: ")[2]
    run_as_printed(command)
    check_weights(str(folder))
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder, use_safetensors=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lm.state_dict().items())


def test_a_folder_without_any_weights(folder: Path) -> None:
    assert "no model.safetensors" in refusal(folder)
    assert "convert" not in refusal(folder)


def test_an_index_of_pickled_shards(folder: Path) -> None:
    """transformers would unpickle a shard that a safetensors index names."""
    torch.save({}, folder / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "pytorch_model-00001-of-00001.bin" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "pytorch_model-00001-of-00001.bin in model.safetensors.index.json" in refusal(folder)


def test_an_index_with_a_shard_that_is_missing(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors is missing" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "{other}/model.safetensors", "sub/model.safetensors", "..", "", ".", "a\x1b[2J", 7],
)
def test_an_index_that_names_files_of_another_place(folder: Path, tmp_path: Path, name: object) -> None:
    """The files are there, and whole: only the place is wrong."""
    for place in (tmp_path / "other", folder / "sub"):
        place.mkdir()
        save_file({"a": torch.zeros(1)}, place / "model.safetensors")
    named = name.format(other=tmp_path / "other") if isinstance(name, str) else name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
    assert "allowed are files in the same folder" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors", "carft_heads.safetensors"])
def test_weights_that_are_links_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    """A repository can hold such links: another model's weights would be trained, saved and given away."""
    private = tmp_path / "private.safetensors"
    save_file({"a": torch.zeros(1)}, private)
    (folder / "carft_heads.json").write_text("{}")
    save_file({}, folder / "carft_heads.safetensors")
    if name.startswith("model-"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    elif name.startswith("carft"):
        save_file({}, folder / "model.safetensors")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    assert f"{name} is a link to {private}, which is not in the folder" in refusal(folder)
    (folder / name).unlink()
    (folder / "held.safetensors").write_bytes(private.read_bytes())
    (folder / name).symlink_to("held.safetensors")
    check_weights(str(folder))


def test_a_snapshot_of_the_hubs_cache_is_links(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--it" / "snapshots" / "0123"
    blobs = tmp_path / "models--me--it" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    save_file({"a": torch.zeros(1)}, blobs / "abcd")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    check_weights(str(snapshot))


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 10**5, "\0\xff"]
)
def test_an_index_of_garbage_is_one_sentence(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    message = refusal(folder)
    assert "model.safetensors.index.json" in message
    assert "\n" not in message


@pytest.mark.parametrize("named", ["adapter_model.bin", "own.safetensors.index.json", "own.safetensors"])
def test_a_config_that_names_the_weights_file(folder: Path, named: str) -> None:
    """transformers reads that one, and unpickles the shards of such an index."""
    save_file({}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    assert f"transformers_weights = '{named}'" in refusal(folder)


@pytest.mark.parametrize("eos", ['"x"', "[[1]]", '{"a": 1}', "1.5"])
def test_ends_of_text_that_are_no_token_ids(folder: Path, eos: str) -> None:
    transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    model = load_model(load_config(None), str(folder), torch.device("cpu"), heads=False)
    with pytest.raises(InputError, match=r"eos_token_id = .* expected token ids"):
        _ = model.eos_ids


def test_heads_of_garbage_are_one_sentence(folder: Path) -> None:
    transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    config = load_config(None)
    heads = {"embedding_dim": config.model.embedding_dim, "value_head": config.model.value_head, "hidden_size": 64}
    (folder / "carft_heads.json").write_text(json.dumps(heads))
    (folder / "carft_heads.safetensors").write_bytes(b"\x1b[2J" * 9)
    with pytest.raises(InputError, match=r"carft_heads\.safetensors: cannot be loaded: "):
        load_model(config, str(folder), torch.device("cpu"), heads=True)


@pytest.mark.parametrize("content", ["[]", "[" * 10**5, "", "{", '"llama"'])
def test_a_config_of_garbage_is_one_sentence(folder: Path, content: str) -> None:
    save_file({}, folder / "model.safetensors")
    (folder / "config.json").write_text(content)
    message = refusal(folder)
    assert "config.json" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("description", "wanted", "pickled"),
    [
        ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        ("carft_heads.json", "carft_heads.safetensors", "carft_heads.pt"),
    ],
)
def test_pickled_adapters_and_heads(folder: Path, description: str, wanted: str, pickled: str) -> None:
    (folder / description).write_text("{}")
    save_file({}, folder / "model.safetensors")
    torch.save({"w": torch.ones(2)}, folder / pickled)
    message = refusal(folder)
    assert f"no {wanted}" in message
    assert f"found {pickled}" in message
    run_as_printed(message.partition("convert them once: ")[2])
    check_weights(str(folder))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A Hub with the repositories in tmp_path/hub, as the client asks for them."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository, _, name = self.path.partition("/resolve/main/")
            file = tmp_path / "hub" / repository.strip("/") / name
            body = file.read_bytes() if name and file.is_file() else b""
            self.send_response(200 if body else 404)
            for header, value in {"X-Repo-Commit": "0" * 40, "ETag": f'"{name}"', "Content-Length": len(body)}.items():
                self.send_header(header, str(value))
            if not body:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


LOAD_FROM_HUB = """
import torch
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.models.load import load_model

for name in ("pickled", "adapter", "good", "index", "outside", "named", "base", "local"):
    try:
        load_model(load_config(None), f"me/{name}", torch.device("cpu"), heads=False)
        print(name, "loaded")
    except InputError as error:
        print(name, error)
"""


def test_pickled_weights_of_the_hub(folder: Path, hub: str, tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    for name in ("pickled", "adapter", "good", "index", "outside", "named", "base", "local"):
        shutil.copytree(folder, tmp_path / "hub" / "me" / name)
    (tmp_path / "hub/me/pickled/model.safetensors").rename(tmp_path / "hub/me/pickled/pytorch_model.bin")
    (tmp_path / "hub/me/adapter/adapter_config.json").write_text('{"base_model_name_or_path": "me/good"}')
    (tmp_path / "hub/me/adapter/adapter_model.bin").write_bytes(b"pickled")
    # transformers unpickles a shard that a safetensors index names
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "hub/me/index/model.safetensors").rename(tmp_path / "hub/me/index/pytorch_model-00001-of-00001.bin")
    (tmp_path / "hub/me/index/model.safetensors.index.json").write_text(json.dumps(index))
    index["weight_map"] = {"lm_head.weight": "../../private.safetensors"}
    (tmp_path / "hub/me/outside/model.safetensors").unlink()
    (tmp_path / "hub/me/outside/model.safetensors.index.json").write_text(json.dumps(index))
    named = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "own.safetensors.index.json"}
    (tmp_path / "hub/me/named/config.json").write_text(json.dumps(named))
    # an adapter's own repository is fine, the model it is for is not
    for name, base in (("base", "me/pickled"), ("local", str(folder))):
        (tmp_path / f"hub/me/{name}/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        (tmp_path / f"hub/me/{name}/adapter_model.safetensors").write_bytes(b"anything")
    client = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD_FROM_HUB], env=os.environ | client, capture_output=True, text=True, cwd=ROOT
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 8, result.stderr
    assert lines[0].startswith('pickled model.path = "me/pickled": no model.safetensors on the Hub')
    assert lines[1].startswith('adapter model.path = "me/adapter": no adapter_model.safetensors on the Hub')
    assert lines[2] == "good loaded"
    assert lines[3].startswith('index model.path = "me/index": no model.safetensors on the Hub')
    assert "allowed are files in the same folder" in lines[4]
    assert "transformers_weights = 'own.safetensors.index.json'" in lines[5]
    assert lines[6].startswith('base model.path = "me/pickled": no model.safetensors on the Hub')
    assert lines[7].endswith(f"base_model_name_or_path = {str(folder)!r}: expected a Hub id")
    assert not list((tmp_path / "home").rglob("*.bin"))


# --- a model's own code ---

MODEL_CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "carft_own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def own_code(folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model that transformers does not know, with a Python file that leaves a mark when it is imported."""
    lm = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    lm.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "carft_own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(MODEL_CODE.format(marker=str(marker)))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_own_code_does_not_run_unless_told(own_code: Path, marker: Path) -> None:
    config = load_config(str(QUICKSTART_CONFIG), [f"model.path={own_code}"])
    load_tokenizer(config.model)  # has no code of its own, and its model's does not run
    assert not marker.exists()
    for load in (
        lambda: load_lm_config(config.model),
        lambda: load_model(config, str(own_code), torch.device("cpu"), heads=True),
    ):
        with pytest.raises(InputError, match=r"Python files.*model\.trust_remote_code = true"):
            load()
        assert not marker.exists()


def test_own_code_of_a_tokenizer_does_not_run(folder: Path, marker: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    (folder / "own.py").write_text(MODEL_CODE.format(marker=str(marker)))
    with pytest.raises(InputError, match="Python files"):
        load_tokenizer(ModelConfig(path=str(folder)))
    assert not marker.exists()


def test_own_code_runs_when_told(own_code: Path, marker: Path, tmp_path: Path) -> None:
    options = [f"model.path={own_code}", "model.trust_remote_code=true"]
    config = load_config(str(QUICKSTART_CONFIG), options)
    load_tokenizer(config.model)
    lm_config = load_lm_config(config.model)
    assert marker.exists()
    assert type(load_model(config, str(own_code), torch.device("cpu"), heads=True).lm).__name__ == "OwnForCausalLM"
    expected = ModelCost.of_config(transformers.LlamaConfig(**{**lm_config.to_dict(), "model_type": "llama"}))
    assert ModelCost.of_config(lm_config, trust_remote_code=True) == expected
    vllm_adapter.write_model_folder(lm_config, tmp_path / "for-vllm")
    assert (tmp_path / "for-vllm" / "own.py").is_file()
    assert json.loads((tmp_path / "for-vllm" / "config.json").read_text())["architectures"] == ["OwnForCausalLM"]
