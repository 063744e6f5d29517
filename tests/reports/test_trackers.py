"""What the back ends themselves have stored of a run, each on this machine, and which of them is refused."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackio.sqlite_storage import SQLiteStorage
from wandb.proto import wandb_internal_pb2

from carft_fast.config import Config, load_config
from carft_fast.core.errors import InputError
from carft_fast.reports.trackers import IDS_FILE, Trackers, check_trackers

ALL = ["tensorboard", "wandb", "trackio", "mlflow"]
SECRET = "Zk83hdQm1pT"
REWARDS = {1: 0.25, 2: 0.5}
REPORT = f"# Report\n\n{SECRET} is in it"


def followed_by(*names: str) -> Config:
    return load_config(None, [f"output.trackers={json.dumps(names)}", f"output.name=trial-{SECRET}", "rl.lr=0.125"])


def record(step: int, **values: Any) -> dict[str, Any]:
    seconds = {"seconds": {"update": 1.5}, "shares": {"update": 1.0}}
    return {"stage": "rl", "kind": "train", "step": step, **values, **seconds}


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Path:
    """Where each back end stores, with nothing that leaves the machine."""
    root = tmp_path_factory.mktemp("places")
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("MLFLOW_TRACKING_URI", f"file://{root}/mlflow")
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    patch.setenv("FOLLOWED_API_KEY", SECRET)
    for module in ("trackio.utils", "trackio.sqlite_storage"):  # read from TRACKIO_DIR when they are imported
        patch.setattr(f"{module}.TRACKIO_DIR", root / "trackio")
    return root


@pytest.fixture(scope="module")
def folder(places: Path, patch: pytest.MonkeyPatch) -> Path:
    """Of a run that went on once, in another process as far as the back ends tell, and named from another folder."""
    folder, config, said = places / "run", followed_by(*ALL), list[str]()
    folder.mkdir()
    check_trackers(config)
    for step, reward in REWARDS.items():
        patch.chdir(places if step == 2 else folder)
        trackers = Trackers(config, Path("run" if step == 2 else "."), said.append)
        trackers.start([])
        rows = [{"question": f"who is {SECRET}?", "reward": reward, "extracted": i or None, "n": i} for i in range(20)]
        trackers.log_samples(f"rl-{step:06d}", rows)
        trackers.log_record(record(step, reward=reward) | {"reward/short": reward / 2})
        if step == 2:
            (folder / "report.md").write_text(REPORT)
            (folder / "report.html").write_text(REPORT)
            trackers.log_report()
        trackers.close()
    assert len(said) == 6, said  # where each is, and no failure
    ends = time.monotonic() + 60
    while [r.WhichOneof("record_type") for r in wandb_records(folder)].count("exit") < len(REWARDS):
        assert time.monotonic() < ends, "wandb's service has not written both starts to their ends"
        time.sleep(0.2)
    return folder


def wandb_records(folder: Path) -> Iterator[Any]:
    """Of the offline files, oldest first: protocol buffers in the log format of LevelDB."""
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, position, message = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if (left := 32768 - position % 32768) < 7:
                position += left
                continue
            _, length, kind = struct.unpack("<IHB", data[position : position + 7])
            if position + 7 + length > len(data):
                return  # it is being written
            message += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or its last part
                found = wandb_internal_pb2.Record()
                found.ParseFromString(message)
                message = b""
                yield found


def test_wandb(folder: Path) -> None:
    found = list(wandb_records(folder))
    runs = {r.run.run_id for r in found if r.WhichOneof("record_type") == "run"}
    assert runs == {json.loads((folder / IDS_FILE).read_text())["wandb"]}, "the second start is of the same run"
    config = {i.key or "/".join(i.nested_key): i.value_json for r in found for i in r.config.update}
    assert config["rl.lr"] == "0.125"
    history = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    assert {h["rl/step"]: h["rl/train/reward"] for h in history if "rl/train/reward" in h} == REWARDS
    tables = folder.glob("wandb/offline-run-*/files/media/table/rl/samples/*.json")
    content = max((json.loads(path.read_text()) for path in tables), key=lambda table: table["data"][0][1])
    assert content["columns"] == ["question", "reward", "extracted", "n"]
    assert content["data"][:2] == [["who is ***?", 0.5, None, 0], ["who is ***?", 0.5, 1, 1]]
    assert len(content["data"]) == 8
    (report,) = folder.glob("wandb/offline-run-*/files/media/html/*.html")
    assert report.read_text() == REPORT.replace(SECRET, "***")


def test_trackio(folder: Path) -> None:
    (name,) = SQLiteStorage.get_runs("carft-fast")
    assert SQLiteStorage.get_run_config("carft-fast", name)["rl.lr"] == 0.125
    logs = SQLiteStorage.get_logs("carft-fast", name)
    assert {log["step"]: log["rl/train/reward"] for log in logs if "rl/train/reward" in log} == REWARDS
    tables = [log["samples/rl"]["_value"] for log in logs if "samples/rl" in log]
    assert [row["extracted"] for row in tables[1][:2]] == [None, 1]
    assert tables[1][1] == {"question": "who is ***?", "reward": 0.5, "extracted": 1, "n": 1}
    assert [log["report"]["_value"] for log in logs if "report" in log] == [REPORT.replace(SECRET, "***")]


def test_mlflow(folder: Path) -> None:
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("carft-fast")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["rl.lr"] == "0.125"
    history = client.get_metric_history(run.info.run_id, "rl/train/reward")
    assert {metric.step: metric.value for metric in history} == REWARDS
    parts = client.get_metric_history(run.info.run_id, "rl/train_reward/short")
    assert {metric.step: 2 * metric.value for metric in parts} == REWARDS
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "samples/rl-000002.json")).read_text())
    assert dict(zip(table["columns"], table["data"][1], strict=True)) == {
        "question": "who is ***?",
        "reward": 0.5,
        "extracted": 1,
        "n": 1,
    }
    assert Path(client.download_artifacts(run.info.run_id, "report.html")).read_text() == REPORT.replace(SECRET, "***")


def test_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tensorboard" / "rl"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("train/reward")} == REWARDS
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "lr = 0.125" in texts["config/text_summary"]
    assert '"question": "who is ***?"' in texts["samples/rl/text_summary"]
    assert texts["report/text_summary"] == REPORT.replace(SECRET, "***")


def test_none_has_stored_a_secret(places: Path, folder: Path) -> None:
    """In no byte of what they wrote; the report that lies there is this test's own."""
    files = [path for path in places.rglob("*") if path.is_file() and path.parent != folder]
    assert len(files) > 100
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_one_that_fails_is_left_out_and_ends_nothing(places: Path, tmp_path: Path) -> None:
    """Its store becomes a file while the run goes on."""
    said = list[str]()
    trackers = Trackers(followed_by("mlflow", "tensorboard"), tmp_path, said.append)
    store = tmp_path / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"file://{store}")
        trackers.start([])
        trackers.log_record(record(1, reward=0.5))
        trackers._tasks.join()
        shutil.rmtree(store)
        store.write_text("")
        for step in (2, 3):
            trackers.log_record(record(step, reward=0.5))
        trackers.close()
    assert ["failed" in line for line in said] == [False, True], said
    assert said[1].startswith("tracker mlflow failed, and gets nothing more of this run: ")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "rl"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/reward")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_one_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError) as error:
        check_trackers(followed_by("tensorboard", name))
    assert str(error.value) == (
        f'output.trackers = ["tensorboard", "{name}"]: {name} is not installed: leave it out, or pip install '
        f'".[{name}]", in the checkout'
    )


@pytest.mark.parametrize(("name", "variable"), [("trackio", "TRACKIO_SERVER_URL"), ("mlflow", "MLFLOW_TRACKING_URI")])
def test_one_that_does_not_answer_is_refused(
    places: Path, monkeypatch: pytest.MonkeyPatch, name: str, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with pytest.raises(InputError, match=rf'output.trackers = \["{name}"\]: {name} cannot be reached: .*refused'):
        check_trackers(followed_by(name))


def test_wandb_without_a_key_is_refused(tmp_path: Path) -> None:
    """In a process of its own: wandb reads its settings once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    code = (
        "from carft_fast.config import load_config; from carft_fast.reports.trackers import check_trackers;"
        "check_trackers(load_config(None, ['output.trackers=[\"wandb\"]']))"
    )
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    said = found.stderr.strip().splitlines()[-1]
    assert (
        'output.trackers = ["wandb"]: wandb cannot be reached: leave it out, or fix this: RuntimeError: no API' in said
    )
