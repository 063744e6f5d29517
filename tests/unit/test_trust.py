"""What is not trusted: pickled weights, a model's own Python files, telemetry, secrets in text, other machines."""

import ast
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
from carft_fast.config.schema import Config, ModelConfig
from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError
from carft_fast.core.redact import redact
from carft_fast.data.synthetic import build_model_config, build_tokenizer
from carft_fast.models.flops import ModelCost
from carft_fast.models.load import check_weights, load_lm_config, load_model, load_tokenizer
from carft_fast.rollout.vllm import adapter as vllm_adapter
from carft_fast.rollout.vllm.launch import ServerProcess, is_loopback, serve, server_environment

PACKAGE = Path(carft_fast.__file__).parent
ROOT = PACKAGE.parent
PLANTED = "hf_PlantedSecret0123456789abcdefghij"


# --- code that is never called ---


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Calls and imports that load or run what somebody else wrote."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (m for m in modules if m.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "yaml"))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("torch.load", "eval", "exec", "os.system", "os.popen"):
                yield f"{name}, line {node.lineno}"
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code") and ast.unparse(keyword.value) == "True":
                    yield f"{keyword.arg}=True, line {node.lineno}"


def test_the_search_finds_what_it_is_for() -> None:
    code = (
        "import pickle\nfrom yaml import load\ntorch.load(p)\neval(t)\nf(trust_remote_code=True)\n"
        "run('ls', shell=True)\nmodel.eval()\nf(trust_remote_code=config.trust_remote_code)\n"
    )
    assert len(list(forbidden(ast.parse(code)))) == 6


def test_the_packages_neither_unpickle_nor_evaluate() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels" / "carft_kernels").rglob("*.py")]
    assert len(files) > 50
    found = {path.name: list(forbidden(ast.parse(path.read_text()))) for path in files}
    # the sandbox runs a model's program: in a process that can do nothing (docs/sandbox.md)
    allowed = {name: calls for name, calls in found.items() if calls}
    assert set(allowed) <= {"sandbox_server.py"}, allowed
    assert all(call.startswith("exec,") for calls in allowed.values() for call in calls), allowed


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

for name in ("pickled", "adapter", "good", "index"):
    try:
        load_model(load_config(None), f"me/{name}", torch.device("cpu"), heads=False)
        print(name, "loaded")
    except InputError as error:
        print(name, error)
"""


def test_pickled_weights_of_the_hub(folder: Path, hub: str, tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    for name in ("pickled", "adapter", "good", "index"):
        shutil.copytree(folder, tmp_path / "hub" / "me" / name)
    (tmp_path / "hub/me/pickled/model.safetensors").rename(tmp_path / "hub/me/pickled/pytorch_model.bin")
    (tmp_path / "hub/me/adapter/adapter_config.json").write_text('{"base_model_name_or_path": "me/good"}')
    (tmp_path / "hub/me/adapter/adapter_model.bin").write_bytes(b"pickled")
    # transformers unpickles a shard that a safetensors index names
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "hub/me/index/model.safetensors").rename(tmp_path / "hub/me/index/pytorch_model-00001-of-00001.bin")
    (tmp_path / "hub/me/index/model.safetensors.index.json").write_text(json.dumps(index))
    client = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD_FROM_HUB], env=os.environ | client, capture_output=True, text=True, cwd=ROOT
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 4, result.stderr
    assert lines[0].startswith('pickled model.path = "me/pickled": no model.safetensors on the Hub')
    assert lines[1].startswith('adapter model.path = "me/adapter": no adapter_model.safetensors on the Hub')
    assert lines[2] == "good loaded"
    assert lines[3].startswith('index model.path = "me/index": no model.safetensors on the Hub')
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


def test_vllm_is_told_only_when_the_user_says_so(tmp_path: Path) -> None:
    def arguments(*options: str) -> list[str]:
        config = load_config(str(QUICKSTART_CONFIG), ["rollout.engine=vllm-server", *options])
        return vllm_adapter.server_arguments(
            vllm_adapter.engine_options(config, "cpu", dedicated=True), tmp_path, "files"
        )

    assert "--trust-remote-code" not in arguments()
    assert "--trust-remote-code" in arguments("model.trust_remote_code=true")


# --- telemetry ---

NAMES = ["HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"]


def environment_of_a_trainer(**given: str) -> dict[str, str]:
    code = (
        "import carft_fast, json, os, huggingface_hub.constants as c\n"
        "print(json.dumps(dict(os.environ) | {'telemetry': str(not c.HF_HUB_DISABLE_TELEMETRY)}))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(result.stdout)


def test_no_library_reports_from_the_trainer() -> None:
    environment = environment_of_a_trainer()
    assert [environment[name] for name in NAMES] == ["1"] * 4
    assert environment["telemetry"] == "False"


def test_what_the_user_set_stays() -> None:
    given = {"HF_HUB_DISABLE_TELEMETRY": "0", "DO_NOT_TRACK": "0", "DISABLE_TELEMETRY": "0", "VLLM_NO_USAGE_STATS": "0"}
    environment = environment_of_a_trainer(**given)
    assert {name: environment[name] for name in given} == given
    assert environment["telemetry"] == "True"


# --- servers ---


def test_what_a_server_that_a_run_starts_gets(tmp_path: Path) -> None:
    """Read from the process itself: no telemetry, its token in the environment and not on the command line."""
    environment = server_environment(None, "127.0.0.1", PLANTED, "files")
    server = ServerProcess(["--model", "nowhere"], tmp_path / "log", environment)
    server.start()
    try:
        process = Path(f"/proc/{server.pid}")
        while not (text := process.joinpath("environ").read_text()):  # Popen returns just before the kernel fills it
            assert server.running
        lines = text.split("\0")
        got = dict(line.split("=", 1) for line in lines if "=" in line)
        command = process.joinpath("cmdline").read_text().split("\0")
    finally:
        server.stop()
    assert [got[name] for name in NAMES] == ["1"] * 4
    assert got["VLLM_API_KEY"] == PLANTED
    assert got["VLLM_HOST_IP"] == "127.0.0.1"
    assert not any(PLANTED in word for word in command)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert PLANTED not in server.url


def test_pickled_handles_are_allowed_only_where_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    allowed = {
        transfer: server_environment(None, "127.0.0.1", None, transfer).get("VLLM_ALLOW_INSECURE_SERIALIZATION")
        for transfer in ("files", "nccl", "ipc")
    }
    assert allowed == {"files": None, "nccl": None, "ipc": "1"}


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "gpu2"]))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "gpu2"])
def test_serving_other_machines_needs_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CARFT_SERVER_TOKEN", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=rf"--host {host}: .*CARFT_SERVER_TOKEN"):
        serve(load_config(str(QUICKSTART_CONFIG), ["rollout.engine=vllm-server"]), host, 8000)


# --- secrets ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://me:pa55@host:8000/x failed", "GET https://***@host:8000/x failed"),
        ("https://host/x?token=abc&n=3#part", "https://host/x?token=***&n=3#part"),
        ("https://host/x?n=3&api_key=abc", "https://host/x?n=3&api_key=***"),
        (f"401 for {PLANTED}.", "401 for ***."),
        ("headers {'Authorization': 'Bearer abc.def'}", "headers {'Authorization': 'Bearer ***'}"),
        ("authorization: basic bWU6cGE=", "authorization: basic ***"),
        ("sent Bearer abc.def", "sent Bearer ***"),
        ("key sk-proj-0123456789abcdefghij", "key ***"),
        ("--set wandb.api_key=abc", "--set wandb.api_key=***"),
        ('password = "abc"', 'password = "***"'),
    ],
)
def test_secrets_are_masked(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "rl.micro_batch_tokens=200 rl.max_new_tokens=24",
        "carft-fast rl --set model.path=HuggingFaceTB/SmolLM2-135M-Instruct",
        "http://127.0.0.1:8000/v1/models?key",
        "the server at http://gpu2:8000 wants the token it was started with",
        "runs/sk-learn-models-with-long-names/data/key=5",
        "set model.trust_remote_code = true",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_a_token_of_the_environment_is_masked_whatever_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARFT_SERVER_TOKEN", "correct-horse-battery")
    assert redact("got 'correct-horse-battery'") == "got '***'"
    monkeypatch.setenv("HF_TOKEN", "a")
    assert redact("a text") == "a text"


@pytest.mark.parametrize(
    ("option", "where"),
    [
        ('rollout.servers=["http://me:pa55@host:8000"]', "CARFT_SERVER_TOKEN"),
        ('rollout.servers=["me:pa55@host:8000"]', "CARFT_SERVER_TOKEN"),
        ('rollout.servers=["http://host:8000?token=pa55"]', "CARFT_SERVER_TOKEN"),
        ("data.eval=https://me:pa55@host/test.json", "data.eval"),
        ("model.path=https://host/m?token=pa55", "model.path"),
        ('data.fields={question="sk-pa55-0123456789abcdefghij"}', "data.fields"),
    ],
)
def test_a_config_does_not_hold_secrets(option: str, where: str) -> None:
    with pytest.raises(InputError, match=where) as error:
        load_config(None, ["rollout.engine=vllm-server", option])
    assert "pa55" not in redact(str(error.value))


def test_nothing_of_the_default_config_looks_like_a_secret() -> None:
    assert Config() == load_config(None)


LEAKY_REWARD = """
import os

def score(completions, examples):
    raise RuntimeError(
        "401 for https://me:pl4nted@host/x?token=pl4nted: sent {'Authorization': 'Bearer %s'}, then %s"
        % (os.environ["HF_TOKEN"], os.environ["CARFT_SERVER_TOKEN"])
    )
"""


def test_a_run_that_meets_secrets_neither_shows_nor_saves_them(tmp_path: Path) -> None:
    """On its command line, in its environment, in an error of a library: a crash that prints everything."""
    (tmp_path / "leaky.py").write_text(LEAKY_REWARD)
    command = [sys.executable, "-m", "carft_fast", "eval", "--config", str(QUICKSTART_CONFIG)]
    for option in ("data.eval_rows=4", "model.path=synthetic", "reward.fn=leaky:score", "reward.partial=constant"):
        command += ["--set", option]
    command += ["--output-dir", f"run/{PLANTED}"]
    planted = {"HF_TOKEN": PLANTED, "CARFT_SERVER_TOKEN": "correct-horse-battery"}
    environment = os.environ | planted | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "RuntimeError: 401 for https://***@host/x?token=***" in result.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"run.json", "config.toml", "console.log"} <= {path.name for path in files}
    saved = "".join(path.read_text() for path in files)
    for secret in (PLANTED, "correct-horse-battery", "pl4nted"):
        assert secret not in result.stdout + result.stderr + saved
    assert json.loads(next(path for path in files if path.name == "run.json").read_text())["command"][-1] == "run/***"
