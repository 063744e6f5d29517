"""A run that meets secrets neither shows nor saves them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import carft_fast
from carft_fast.cli import QUICKSTART_CONFIG

ROOT = Path(carft_fast.__file__).parents[1]

PLANTED = "hf_PlantedSecret0123456789abcdefghij"
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
