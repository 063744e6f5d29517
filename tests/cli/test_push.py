"""`carft-fast export --push` against a local server that stands in for the Hub, over HTTP, by HF_ENDPOINT."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

from carft_fast.config.toml import load_config
from carft_fast.core.errors import InputError, TrainingError
from carft_fast.data.synthetic import build_tokenizer
from carft_fast.models.load import load_model
from carft_fast.training import hub as hub_module
from carft_fast.training.checkpoint import CheckpointStore
from carft_fast.training.export import export_checkpoint
from carft_fast.training.optim import build_optimizer

TOKEN = "hf_" + "a1B2c3D4" * 4
ROOT = Path(__file__).resolve().parents[2]


class Hub(BaseHTTPRequestHandler):
    """Its API as far as an upload asks: who am I, make a repository, which files are large, take them, commit."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one(b"")

    def do_POST(self) -> None:
        self.handle_one(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_PUT = do_POST

    def handle_one(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((self.command, path))
        if path.startswith("/blob/"):  # of an address that the server gave out
            hub.large[path.rpartition("/")[2]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            hub.validated = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.answer({"warnings": [], "errors": []})
        if path == "/api/whoami-v2":
            return self.answer({"name": "ada", "type": "user", "auth": {}})
        if path == "/api/repos/create":
            hub.made = json.loads(body)
            return self.answer({"url": f"{hub.address}/ada/model"})
        if path == "/api/models/ada/model/preupload/main":
            files = json.loads(body)["files"]
            modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
            return self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        if path == "/ada/model.git/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.address}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path == "/api/models/ada/model/commit/main" and not hub.full:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
            return self.answer(
                {"commitUrl": f"{hub.address}/ada/model/commit/{0:040}", "commitOid": "0" * 40, "success": True}
            )
        return self.answer({"error": "no such thing here"}, 404 if not hub.full else 403)

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.large, server.made, server.full = [], {}, {}, None, False
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """With LoRA, of a run whose folder has the record of its evaluation."""
    options = ["model.path=synthetic", "lora.rank=2", "data.train=openai/gsm8k", "data.eval=/data/secret/test.json"]
    config = load_config(None, [*options, "rl.lr=1e-4"])
    model = load_model(config, "synthetic", torch.device("cpu"), heads=True)
    run = tmp_path / "run"
    store = CheckpointStore(run / "checkpoints", config, print)
    optimizer = build_optimizer(model, config.rl)
    saved = store.save("rl", 7, model, build_tokenizer(), optimizer, model_path="synthetic", seed=0)
    figures = {"accuracy": 0.625, "accuracy_ci95": [0.5, 0.75], "rows": 64, "completion_length": 81.25}
    record = {"stage": "rl", "kind": "eval", "step": 7, "seconds": {}, **figures}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return saved


def export(checkpoint: Path, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HOME": str(folder.parent / "hf"), **environment}
    command = [sys.executable, "-m", "carft_fast", "export", str(checkpoint), str(folder), *words]
    return subprocess.run(command, env=own, capture_output=True, text=True)


def test_the_hub_gets_the_folder_and_a_card(hub: Any, checkpoint: Path, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    ended = export(checkpoint, tmp_path / "out", "--push", "ada/model", **settings)
    assert ended.returncode == 0, ended.stderr
    there = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert hub.files == there
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "carft_heads.safetensors"} <= hub.files.keys()
    assert hub.made["visibility"] == "private"
    assert hub.validated["pipeline_tag"] == "text-generation"
    card = hub.files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["datasets"] == ["openai/gsm8k"]
    assert "base_model" not in metadata, "the quickstart's is not on the Hub"
    for text in ("62.5% (50.0% to 75.0%, 64 rows)", "| rl.lr | 0.0001 |", "RL step 7, seed 0", "test.json (local)"):
        assert text in card
    assert "/data/secret" not in card
    assert TOKEN not in ended.stdout + ended.stderr


def test_a_card_names_no_place_of_this_machine(tmp_path: Path) -> None:
    """Of data that is mixed, of templates and of solved questions the names alone, or nothing."""
    options = [
        "model.path=/data/secret/model",
        'data.mix={"/data/secret/a.jsonl"=3, "openai/gsm8k"=1}',
        "data.eval=/data/secret/b.jsonl",
        "data.few_shot=/data/secret/shots.csv",
        "data.template=/data/secret/ask.jinja",
    ]
    card = hub_module.model_card(load_config(None, options), "sft", 3, tmp_path, "ada/model")
    assert "/data/secret" not in card
    assert "| training data | a.jsonl (local), openai/gsm8k |" in card
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["openai/gsm8k"]
    assert "Prompt: a Jinja template of the run's own." in card


@pytest.fixture
def in_process(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_a_token_is_looked_for_before_anything_is_written(
    in_process: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "hf_" + "z9" * 16
    for token, message in (("", "no token for the Hub: set HF_TOKEN"), (other, "does not take the token")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(InputError, match=message) as error:
            export_checkpoint(checkpoint, tmp_path / "out", push_to="ada/model")
        assert other not in str(error.value)
        assert not (tmp_path / "out").exists()
    assert {method for method, _ in in_process.asked} <= {"GET"}, "nothing was made on the Hub"


def test_a_failed_upload_leaves_the_model_and_says_how_to_go_on(
    in_process: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = in_process
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        export_checkpoint(checkpoint, tmp_path / "out", push_to="ada/model")
    for name in ("ada", "ada/mo del", "ada/a/b"):
        with pytest.raises(InputError, match=f'--push "{name}"'):
            export_checkpoint(checkpoint, tmp_path / "out", push_to=name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.full = True
    with pytest.raises(TrainingError, match=r"was not pushed to ada/model.*hf upload ada/model"):
        export_checkpoint(checkpoint, tmp_path / "out", push_to="ada/model", public=True)
    assert (tmp_path / "out" / "README.md").is_file()
    assert hub.made["visibility"] == "public"
