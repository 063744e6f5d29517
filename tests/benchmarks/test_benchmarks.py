"""Benchmark rows, their comparison, the page and README's table built from them; no clock is asked."""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import compare, gpu, growth, long_run
from benchmarks import rows as rows_module
from benchmarks.ops import cases as op_cases
from benchmarks.ops import measure as ops
from benchmarks.ops.cases import PLAIN
from benchmarks.report import ANOTHER_COMMIT, build, environment, exponent, load
from benchmarks.rows import COLUMNS, RESULTS, commit, processor_model, read, write
from benchmarks.step_report import BASELINE
from carft_fast.core.errors import InputError
from carft_fast.models.packing import pack

MACHINE = {"device": "cpu", "processor": "x86_64", "model": "Some CPU", "cores": "2", "threads": "1", "commit": "abc"}
ROOT = RESULTS.parents[1]


def ops_file(folder: Path, name: str, p50: float, *, machine: dict[str, str] | None = None, **more: Any) -> Path:
    row = {"case": "gae, T=8192 length=128", "variant": "gae", "p50_ms": p50, "peak_mb": 4.0} | more
    write(folder / name, "ops", machine or MACHINE, [row])
    return folder / name


def outcome(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


# --- rows -------------------------------------------------------------------------------------------------------------


def test_processors_of_one_name_are_told_apart(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    one = "processor\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD, EPYC\nstepping\t: 1\n\n"
    info.write_text(one.format(0, 25, 17) + one.format(1, 25, 17))
    assert processor_model(info) == "AMD EPYC family 25 model 17"
    info.write_text(one.format(0, 26, 2))
    assert processor_model(info) == "AMD EPYC family 26 model 2"
    info.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert processor_model(info) == processor_model(tmp_path / "missing") == "unknown"


def test_new_rows_do_not_make_a_commit_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert commit() == "unknown"

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    files = [tmp_path / "benchmarks" / "results" / "rows.json", tmp_path / "benchmarks" / "step.py"]
    for file in files:
        file.write_text("old")
    git("init")
    git("add", ".")
    git("commit", "-m", "rows")
    clean = commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    files[0].write_text("new")
    monkeypatch.chdir(tmp_path / "benchmarks")
    assert commit() == clean
    files[1].write_text("new")
    assert commit() == f"{clean}-dirty"


# --- compare ----------------------------------------------------------------------------------------------------------


def test_a_figure_worse_beyond_the_band_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ops_file(tmp_path, "base.json", 10.0, plain_over_this=2.0)
    near = ops_file(tmp_path, "near.json", 10.9, plain_over_this=1.9)
    slow = ops_file(tmp_path, "slow.json", 11.2, plain_over_this=2.0)
    fast = ops_file(tmp_path, "fast.json", 5.0, plain_over_this=4.0)
    less = ops_file(tmp_path, "less.json", 10.0, plain_over_this=1.7)
    assert outcome(monkeypatch, base, near) == 0
    capsys.readouterr()
    assert outcome(monkeypatch, base, slow) == 1
    assert "gae, T=8192 length=128, gae: p50_ms 10 -> 11.2 (1.120) WORSE" in capsys.readouterr().out
    assert outcome(monkeypatch, base, slow, "--band", "0.15") == 0
    assert outcome(monkeypatch, base, fast) == 0
    assert outcome(monkeypatch, base, less) == 1  # higher is better


@pytest.mark.parametrize("name", ["ops_cpu.json", "step_cpu.json", "growth_cpu.json", "rollout_cpu.json"])
def test_no_committed_figure_is_worse_than_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences may be below 0."""
    file = ROOT / "benchmarks/results" / name
    assert outcome(monkeypatch, file, file, "--band", "0") == 0


def test_counted_figures_have_no_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, registers in (("base", 40), ("more", 41), ("fewer", 39)):
        row = {"kernel": "k", "configuration": "c", "chip": "sm_90", "registers": registers, "failed": []}
        write(tmp_path / f"{name}.json", "kernels_aot", {"triton": "3.9.0"}, [row])
    base, more, fewer = (tmp_path / f"{name}.json" for name in ("base", "more", "fewer"))
    assert outcome(monkeypatch, base, more, "--band", "0.5") == 1
    assert outcome(monkeypatch, base, fewer) == 0


def test_a_row_that_is_gone_or_was_not_timed_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ops_file(tmp_path, "base.json", 10.0)
    other = ops_file(tmp_path, "other.json", 10.0, variant="plain torch")
    assert outcome(monkeypatch, base, other) == 1
    assert "gone from HEAD" in capsys.readouterr().out
    wrong = {"case": "gae, T=8192 length=128", "variant": "gae", "why": "wrong: result 0 is off"}
    write(tmp_path / "wrong.json", "ops", MACHINE, [wrong])
    assert outcome(monkeypatch, base, tmp_path / "wrong.json") == 1
    assert "HEAD has no p50_ms: wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cores": "4"}, "times of two machines are not compared"),
        ({"clock": "cpu"}, "times of two machines are not compared"),
        ({"device": "cuda", "gpu": "NVIDIA H100"}, "times of two machines are not compared"),
    ],
)
def test_other_machines_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    message: str,
) -> None:
    base = ops_file(tmp_path, "base.json", 10.0)
    assert outcome(monkeypatch, base, ops_file(tmp_path, "new.json", 1.0, machine=MACHINE | {"commit": "d"})) == 0
    assert outcome(monkeypatch, base, ops_file(tmp_path, "head.json", 10.0, machine=MACHINE | change)) == 2
    assert message in capsys.readouterr().err


def test_other_benchmarks_and_schemas_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ops_file(tmp_path, "base.json", 10.0)
    write(tmp_path / "growth.json", "growth", MACHINE, [])
    assert outcome(monkeypatch, base, tmp_path / "growth.json") == 2
    assert "BASE holds ops, HEAD growth" in capsys.readouterr().err
    old = json.loads(base.read_text()) | {"schema": 1}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert outcome(monkeypatch, base, tmp_path / "old.json") == 2
    assert re.search(r'old.json: "schema" of ops is 1, this version reads 2', capsys.readouterr().err)
    assert outcome(monkeypatch, base, tmp_path / "none.json") == 2
    assert "No such file" in capsys.readouterr().err
    assert outcome(monkeypatch, base, base, "--band", "1.5") == 2


# --- rows -------------------------------------------------------------------------------------------------------------


def committed() -> list[Path]:
    return [file for file in sorted(RESULTS.glob("*.json")) if not file.name.startswith("peers")]


@pytest.mark.parametrize("file", committed(), ids=lambda file: file.stem)
def test_committed_rows_are_whole(file: Path) -> None:
    """Rows can be told apart, belong to a machine, and every figure has a unit."""
    found = read(file)
    names = [tuple(row.get(part) for part in found.key) for row in found.rows]
    assert len(set(names)) == len(names) > 0
    for row in found.rows:
        assert row["machine"]
        figures = {name for name, value in row.items() if type(value) is float} - {"bound_ms", "mufu_per_element"}
        assert figures <= set(COLUMNS), row


def test_counts_are_what_the_kernels_do_now(tmp_path: Path) -> None:
    """`python -m benchmarks.counts` writes what is committed, so a change of traffic or FLOPs shows in the diff."""
    file = tmp_path / "counts.json"
    command = [sys.executable, "-m", "benchmarks.counts", "--output", str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=900)
    new, old = json.loads(file.read_text())["rows"], json.loads((RESULTS / "counts.json").read_text())["rows"]
    assert new == old, "run python -m benchmarks.counts and commit what it writes"
    # F = 2 T V D, of which each operator's docstring says how many it takes
    units = {
        row["what"]: row["flops"] / (2 * 32 * 256 * 32)
        for row in old
        if "flops" in row and row["case"].startswith("float32")
    }
    assert units["linear_logprob, forward"] == 1
    assert units["linear_logprob, forward and backward"] == 4
    assert units["linear_policy_loss, forward and backward"] == 3
    # two chunks of 4,096 tokens: d_weight is written, read and written, read and cast; the weight is read for the
    # logits and for d_hidden, by linear_logprob once more
    gpu = {row["what"]: row for row in old if row["case"] == "bfloat16 T=8192 V=152064 D=3584"}
    elements = 152_064 * 3584
    for what, reads in (("linear_policy_loss", 4), ("linear_logprob", 5)):
        assert gpu[f"{what} on a GPU"]["gradient_of_the_weight_bytes"] == (4 + 8 + 4 + 2) * elements
        assert gpu[f"{what} on a GPU"]["weight_bytes"] == 2 * reads * elements


# --- make -------------------------------------------------------------------------------------------------------------


def test_every_target_has_one_recipe() -> None:
    """make warns, and takes the last: a folder of libraries then lacks those of the first."""
    found = subprocess.run(["make", "--dry-run", "help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "overriding recipe" not in found.stderr


# --- growth -----------------------------------------------------------------------------------------------------------


def test_variants_of_a_group_do_the_same() -> None:
    prepared = {name: make() for name, make in growth.group_makers(2).items()}
    steps, wrong = ops.checked(growth.group_steps(prepared))
    assert not wrong
    assert float(steps[PLAIN]()[0]) > 0.01  # else there is nothing to agree on
    tokens = {
        name: len(
            pack(
                p.samples.rollouts.prompts,
                p.samples.rollouts.completions,
                torch.device("cpu"),
                share_prompts=p.config.shares_prompts,
            ).ids_T
        )
        for name, p in prepared.items()
    }
    assert tokens["carft_fast"] == 8 * (128 + 32)
    assert tokens["carft_fast, shared prompts"] == 4 * 128 + 8 * 32


@pytest.mark.long
def test_processes_take_the_same_step() -> None:
    """`ranks` fails where their losses differ."""
    rows = growth.ranks(sizes=(2,), sequences=4, rounds=1)
    assert [row["variant"] for row in rows] == ["DDP", "FSDP2"]
    assert all(row["p50_ms"] > 0 and row["machine"]["cores"] for row in rows)


def test_the_slowest_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = [
        {"seconds": [1.0, 5.0, 2.0], "peak_mb": 7.0, "loss": 0.5},
        {"seconds": [3.0, 4.0, 1.0], "peak_mb": 9.0, "loss": 0.5},
    ]

    def spawn(work: Any, arguments: tuple[Any, ...], nprocs: int) -> None:
        for rank in range(nprocs):
            Path(arguments[-1], f"{rank}.json").write_text(json.dumps(dict.fromkeys(growth.STRATEGIES, found[rank])))

    monkeypatch.setattr(growth.mp, "spawn", spawn)
    (ddp, _) = growth.ranks(sizes=(2,))
    assert (ddp["p50_ms"], ddp["peak_mb"]) == (3000, 9)
    found[1]["loss"] = 0.51
    with pytest.raises(RuntimeError, match=r"2 processes: losses from 0\.5 to 0\.51"):
        growth.ranks(sizes=(2,))


def test_only_a_part_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(against: str, value: float) -> Callable[[str], list[dict[str, Any]]]:
        row = {"operator": "x", "against": against, "size": 1, "variant": "y", "p50_ms": value, "peak_mb": value}
        return lambda clock: [row]

    monkeypatch.setattr(growth, "RESULTS", tmp_path)
    for value, words in ((1.0, []), (2.0, ["--only", "ranks"])):
        monkeypatch.setattr(growth, "PARTS", {name: rows(name, value) for name in ("operators", "ranks")})
        monkeypatch.setattr(sys, "argv", ["growth", *words])
        growth.main()
    found = read(tmp_path / "growth_cpu.json").rows
    assert {row["against"]: row["p50_ms"] for row in found} == {"operators": 1.0, "ranks": 2.0}


# --- long runs --------------------------------------------------------------------------------------------------------


def test_trend_is_that_after_the_warm_up() -> None:
    # 0 to 99 in the warm-up, then a line that rises by 0.5 every step
    values = [1e6] * 100 + [10 + 0.5 * i for i in range(900)]
    found = long_run.trend(values)
    assert found == pytest.approx((10 + 0.5 * 44.5, 10 + 0.5 * 854.5, 10 + 0.5 * 899, 500))
    seen = [dict.fromkeys(long_run.FIGURES, value) for value in values]
    rows = long_run.rows_of("hf", seen)
    assert [row["step"] for row in rows] == list(range(10, 1001, 10))
    of_rows = long_run.trend([row["resident_mb"] for row in rows], 10)
    assert (of_rows.first, of_rows.last, of_rows.slope) == pytest.approx((found.first, found.last, 500))


def test_processor_time_is_that_of_the_process() -> None:
    time.sleep(0.2)  # which counts for nothing
    before, own = long_run.cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - own < 0.3:
        pass
    # a tick of the kernel is 10 ms
    assert long_run.cpu_seconds(os.getpid()) - before == pytest.approx(time.process_time() - own, abs=0.05)


# --- page -------------------------------------------------------------------------------------------------------------


class Tables(HTMLParser):
    """Texts of the cells of every table, by section."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.section, self.cells, self._in_cell = "", {}, False
        self.links: list[str] = []
        self.found: list[tuple[str, list[str]]] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.links += [named[name] or "" for name in ("src", "href", "xlink:href", "action") if name in named]
        if tag == "section":
            self.section = named["id"] or ""
        elif tag == "table":
            self.found.append((self.section, []))
        elif tag == "td":
            self.found[-1][1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.found[-1][1][-1] += data


@pytest.fixture(scope="module")
def document() -> str:
    return build()


def test_the_page_holds_everything_it_shows(document: str) -> None:
    tables = Tables(document)
    assert tables.links
    assert all(link.startswith(("#", "data:")) for link in tables.links)
    assert "@import" not in document
    assert re.findall(r"url\((?!#)", document) == []


def test_what_no_gpu_measured_is_said_in_every_table(document: str) -> None:
    found = load(RESULTS)
    if any(measured.gpu for measured in found.values()):
        pytest.fail("there are rows of a GPU now: this test has to look at those that are missing")
    sections = {name for name, cells in Tables(document).found if "not measured" in cells}
    all_sections = {name for name, _ in Tables(document).found}
    # programs never run on a GPU, and the last describes
    assert all_sections - sections == {"sandbox", "units"}
    for case in op_cases.CASES:
        assert case.name in document


def test_rows_of_a_gpu_fill_the_columns(tmp_path: Path) -> None:
    for file in committed():
        shutil.copy(file, tmp_path)
    machine = MACHINE | {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "driver": "550.54.15"}
    gae = next(case.name for case in op_cases.CASES if case.operator == "gae")
    qwen = next(case.name for case in op_cases.CASES if case.shape == op_cases.QWEN)
    rows = [
        {"case": gae, "variant": "gae", "p50_ms": 0.01234},
        {"case": qwen, "variant": "cut-cross-entropy", "p50_ms": 98.76},
        {"case": qwen, "variant": "torch.compile", "why": "wrong: result 1 is off by 3"},
    ]
    write(tmp_path / "ops_h100.json", "ops", machine, rows)
    tests = {"part": "tests", "what": "tests/ops", "result": "321 passed in 60.00s"}
    write(tmp_path / "gpu_h100.json", "gpu", machine, [tests])
    page = build(tmp_path)
    cells = [cell for _, table in Tables(page).found for cell in table]
    assert {"0.01234", "98.76", "wrong: result 1 is off by 3", "321 passed in 60.00s"} <= set(cells)
    assert any("NVIDIA H100 80GB HBM3" in cell and "driver 550.54.15" in cell for cell in cells)
    assert "Nothing here ran on a GPU" not in page


def test_growth_and_long_runs_are_shown(tmp_path: Path) -> None:
    for file in committed():
        shutil.copy(file, tmp_path)
    old = read(RESULTS / "growth_cpu.json").rows
    rows = [row for row in old if row["against"] not in ("group size", "ranks")]
    for against, operator in (("group size", "Dr.GRPO step"), ("ranks", "CARFT step")):
        for size in (2, 4):
            row = {"operator": operator, "against": against, "size": size, "variant": "y"}
            rows.append(row | {"p50_ms": 7.0 * size**3, "peak_mb": 5.0 / size, "machine": MACHINE | {"cores": "96"}})
    write(tmp_path / "growth_cpu.json", "growth", MACHINE, rows)
    steps = json.loads((RESULTS / "step_cpu.json").read_text())
    steps["rollouts"] = [{"rollouts": n, "fast, recomputing": 50.0, BASELINE: 40.0 * n**2} for n in (4, 8, 16)]
    (tmp_path / "step_cpu.json").write_text(json.dumps(steps))
    seen = [dict.fromkeys(long_run.FIGURES, 3.0) | {"resident_mb": 500.0 + 0.25 * i} for i in range(1000)]
    write(tmp_path / "long_run_vllm_cpu.json", "long_run", MACHINE, long_run.rows_of("vllm", seen))
    page = build(tmp_path)
    tables = dict(Tables(page).found)
    growths = ["|".join(tables["growth"][i : i + 8]) for i in range(0, len(tables["growth"]), 8)]
    for line in (
        "Dr.GRPO step|group size|2 to 4|time|y|56 to 448 ms|3|not measured",
        "CARFT step|ranks|2 to 4|memory|y|2.5 to 1.25 MiB|-1|not measured",
        "training step|rollouts|4 to 16|memory|fast, recomputing|50 to 50 MiB|0|not measured",
        f"training step|rollouts|4 to 16|memory|{BASELINE}|640 to 10,240 MiB|2|not measured",
    ):
        assert line in growths
    assert "it has 96 cores" in page
    for title in ("training step: memory against rollouts", "CARFT step: time against ranks"):
        assert f"<figcaption>{title}</figcaption><svg" in page
    runs = ["|".join(tables["long-runs"][i : i + 9]) for i in range(0, len(tables["long-runs"]), 9)]
    what = COLUMNS["resident_mb"].what
    assert f"vllm|1,000|{what}|MiB|536.1|738.6|748.6|250|not measured" in runs
    assert f"<figcaption>{html.escape(what)}, against steps</figcaption><svg" in page


def test_fit() -> None:
    assert exponent([(x, 3.0 * x**1.5) for x in (2.0, 4.0, 16.0)]) == pytest.approx(1.5)


# --- README -----------------------------------------------------------------------------------------------------------


def readme_table() -> Any:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "scripts" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_readme_shows_the_committed_rows(page: str, tmp_path: Path) -> None:
    script = readme_table()
    text = (ROOT / page).read_text(encoding="utf-8")
    assert script.updated(page, text) == text, "run make readme"
    for file in RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    step, peers = (json.loads((tmp_path / f"{name}_cpu.json").read_text()) for name in ("step", "peers"))
    (case,) = (case for case in step["cases"] if case["case"] == "SmolLM2-135M")
    case["rows"][0]["seconds"]["update"] *= 2
    wanted = {"case": "SmolLM2-135M, CARFT", "side": "published CARFT step"}
    script.only(peers["rows"], **wanted, measure="processor time over carft_fast, CARFT's")["value"] = 87.6
    peers["cases"][wanted["case"]]["machine"] = "trl 1.16.0, commit 0123abc"
    for name, data in (("step", step), ("peers", peers)):
        before = script.updated(page, text, tmp_path)
        (tmp_path / f"{name}_cpu.json").write_text(json.dumps(data))
        assert script.updated(page, text, tmp_path) != before
    (row,) = (
        line
        for line in script.updated(page, text, tmp_path).splitlines()
        if line.startswith("| ") and "| 87.6 |" in line
    )
    assert "published CARFT" in row
    assert row.endswith("| 0123abc |")
    with pytest.raises(SystemExit, match="measured: "):
        script.updated(page, "no markers")


def test_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_every_path_shows_its_time_and_its_memory() -> None:
    """The default's memory too, which is more than the baseline's; published trainers come first."""
    script = readme_table()
    rows = [row for row in read(RESULTS / "step_cpu.json").rows if "size" not in row]
    table = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for row in rows:
        path = script.PADDED if row["path"] == BASELINE else row["path"]
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {row['case']} | {path} |"))
        cells = line.strip("| ").split(" | ")
        base = script.only(rows, case=row["case"], path=BASELINE)
        phases = [sum(r[name] for name in ("logprobs_s", "update_s")) for r in (base, row)]
        assert cells[3] == f"{phases[0] / phases[1]:.1f}"
        assert cells[5] == f"{base['update_peak_mb'] / row['update_peak_mb']:.1f}"
        assert cells[-1] == row["machine"]["commit"]
    against = [line.split(" | ")[0].strip("| ") for line in script.peers_table(script.load(RESULTS)).splitlines()[2:]]
    assert [name.startswith("published ") for name in against[:3]] == [True, True, False]


def test_rows_of_several_commits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = readme_table()
    for name in script.NAMES:
        text = (RESULTS / f"{name}_cpu.json").read_text()
        text = re.sub(r"commit [0-9a-f]+(-dirty)?", "commit 0123abc", text)
        text = re.sub(r'"commit": "[^"]*"', '"commit": "0123abc"', text)
        (tmp_path / f"{name}_cpu.json").write_text(text)
    assert script.mixed(tmp_path) == ""
    file = tmp_path / "rollout_cpu.json"
    one = file.read_text()
    for other in ("89abcde", "0123abc-dirty"):
        file.write_text(one.replace("commit 0123abc", f"commit {other}", 1))
        assert f"rollout_cpu.json: {other}, 0123abc; ops_cpu.json: 0123abc" in script.mixed(tmp_path)
    file.write_text(one.replace("commit 0123abc", "commit 0123abc-dirty"))  # what changed is in no commit
    assert "rollout_cpu.json: 0123abc-dirty;" in script.mixed(tmp_path)
    monkeypatch.setattr(script, "mixed", lambda: "rollout_cpu.json: a, b")
    monkeypatch.setattr(script, "ROOT", tmp_path)  # nothing is written, and nothing could be read
    monkeypatch.setattr(sys, "argv", ["readme_table", "--one-commit"])
    with pytest.raises(SystemExit, match=r"one commit and a clean tree; these are not\. rollout_cpu\.json: a, b"):
        script.main()


def test_the_page_marks_rows_of_another_commit_than_its_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dates = {"aaa1111": "1", "bbb2222": "2"}

    def log(*words: str) -> SimpleNamespace:
        date = dates.get(words[words.index("--end-of-options") + 1])
        return SimpleNamespace(returncode=0 if date else 128, stdout=date)

    monkeypatch.setattr(rows_module, "_git", log)
    for number, name in enumerate(["aaa1111", "bbb2222", "bbb2222-dirty", "unknown"]):
        ops_file(tmp_path, f"ops_{number}.json", 1.0, machine=MACHINE | {"commit": name, "python": str(number)})
    page = "".join(environment(load(tmp_path), tmp_path))
    cells = Tables(f"<section id=environment>{page}</section>").found[0][1]
    marks = {cells[i + 3]: cells[i + 4] for i in range(0, len(cells), 5) if cells[i] == "ops"}
    other = {"aaa1111", "bbb2222-dirty", "unknown"}
    assert marks == {"bbb2222": ""} | dict.fromkeys(other, ANOTHER_COMMIT)
    assert "The newest commit of the rows is bbb2222." in page
    dates.clear()
    page = "".join(environment(load(tmp_path), tmp_path))
    assert ANOTHER_COMMIT not in page
    assert "Git knows none of the commits, so that no row is marked" in page


# --- GPU --------------------------------------------------------------------------------------------------------------

NCU = """==PROF== Connected to process 1234
==PROF== Disconnected from process 1234
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","python","h","logprob_fwd_kernel","1","7","(512, 1, 1)","(8192, 1, 1)","0","9.0","Metrics",\
"dram__bytes.sum","Gbyte","2.49"
"0","1","python","h","logprob_fwd_kernel","1","7","(512, 1, 1)","(8192, 1, 1)","0","9.0","Metrics",\
"gpu__time_duration.sum","us","812.3"
"1","1","python","h","gae_kernel","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0","Metrics",\
"gpu__time_duration.sum","us","4.1"
"""


def test_ncu_output_becomes_rows() -> None:
    assert gpu.ncu_rows(NCU) == [
        ("logprob_fwd_kernel", "memory moved 2.49 Gbyte, time 812.3 us"),
        ("gae_kernel", "time 4.1 us"),
    ]
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        gpu.ncu_rows("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")


def test_nvidia_smi_is_asked_about_the_gpu_that_torch_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    with pytest.raises(OSError, match="nvidia-smi is not on the PATH"):
        gpu.nvidia_smi(gpu.CHANGING)
    assert gpu.state() == "unknown: nvidia-smi is not on the PATH"
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=GPU-1234) echo "1980 MHz, 2619 MHz, 41, 99.5 W";; esac\n')
    tool.chmod(0o755)
    assert gpu.state() == "1980 MHz SM, 2619 MHz memory, 41 C, 99.5 W"
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert gpu.state() == "unknown: nvidia-smi answered 'No devices were found'"
    assert gpu.slug("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "right,opps"], "--parts right,opps: 'opps' is no part; allowed are right, ops, step, lora"),
        (["--minutes", "0"], "--minutes 0: has to be above 0 and at most 60"),
        (["--wheels", "nowhere"], "--wheels: nowhere holds no pydantic_core: make gpu-wheels fills build/gpu_wheels"),
    ],
)
def test_wrong_options_are_named(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_packages_for_another_python_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PYTHONPATH", "PATH"):
        monkeypatch.setenv(variable, "before")
    monkeypatch.setattr(sys, "path", [*sys.path])
    compiled = tmp_path / "pydantic_core" / "_pydantic_core.cpython-38-x86_64-linux-gnu.so"
    compiled.parent.mkdir()
    compiled.touch()
    with pytest.raises(ValueError, match=r"cpython-38-x86_64-linux-gnu\.so is for another Python than this, 3\.1"):
        gpu.use_wheels(tmp_path)
    compiled.rename(compiled.with_name(f"_pydantic_core{EXTENSION_SUFFIXES[0]}"))
    gpu.use_wheels(tmp_path)
    assert os.environ["PYTHONPATH"] == f"{tmp_path}{os.pathsep}before"


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "benchmarks.gpu", "--results", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert found.returncode == 2
    assert re.fullmatch(r"error: no GPU: torch \S+ \(CUDA \S+\) sees no CUDA device, and .*\n", found.stderr)
    assert list(tmp_path.iterdir()) == []


def test_only_our_own_operator_fails_the_part() -> None:
    ours = {"case": "gae, T=8", "variant": "gae", "p50_ms": 1.5}
    plain = {"case": "gae, T=8", "variant": PLAIN, "p50_ms": 3.0}
    theirs = {"case": "gae, T=8", "variant": "liger", "why": "failed: OutOfMemoryError: of CUDA"}
    absent = {"case": "gae, T=8", "variant": "trl", "why": "not installed: trl"}
    fine = gpu.operator_result("gae", [ours, plain, theirs, absent])
    assert fine == "gae 1.5 ms; plain torch 3 ms; liger: failed: OutOfMemoryError: of CUDA"
    off = {"case": "gae, T=8", "variant": "gae", "why": "wrong: result 0 is off by 3"}
    assert gpu.operator_result("gae", [off, plain]) == "failed: plain torch 3 ms; gae: wrong: result 0 is off by 3"


PART = """
import json, os, pathlib, sys, time
part, folder = sys.argv[sys.argv.index("--part") + 1], sys.argv[sys.argv.index("--results") + 1]
file = pathlib.Path(folder, "gpu_x.json")
for case in range(5):
    data = json.loads(file.read_text())
    done = sum(row["part"] == part for row in data["rows"])
    if done > case:
        continue
    if part in ("right", "step") and case == 2:
        os.kill(os.getpid(), 9)
    if part == "lora":
        sys.exit(1)
    if part == "rollout" and case == 1:
        time.sleep(60)
    data["rows"].append({"part": part, "what": str(case), "result": "fine"})
    file.write_text(json.dumps(data))
"""


def test_a_part_that_is_killed_leaves_its_rows_and_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes. Operators go on after the one that killed theirs; a part without rows is tried once."""
    python = tmp_path / "python"
    (tmp_path / "part.py").write_text(PART)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I {tmp_path / "part.py"} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gpu, "gpu_machine", lambda: MACHINE)
    monkeypatch.setattr(gpu, "result_file", lambda folder: folder / "gpu_x.json")
    monkeypatch.setattr(gpu, "state", lambda: "")
    parts = ("right", "step", "lora")
    rows = gpu.run_all(parts, tmp_path, 10.0)
    found = {part: [(row["what"], row["result"]) for row in rows if row["part"] == part] for part in parts}
    killed = ("process 3", "failed: exit code -9")
    assert found["right"] == [("0", "fine"), ("1", "fine"), killed, ("3", "fine"), ("4", "fine")]
    assert found["step"] == [("0", "fine"), ("1", "fine"), killed]
    assert found["lora"] == [("process 1", "failed: exit code 1")]
    assert gpu.summary(parts, rows) == [
        "done: nothing",
        "failed: right process 3 (exit code -9)",
        "failed: step process 3 (exit code -9)",
        "failed: lora process 1 (exit code 1)",
    ]
    # rows of other parts stay, with their machine
    late = gpu.run_all(("rollout",), tmp_path, 0.05)
    assert [row["what"] for row in late] == ["0", "out of time"]
    assert late[1]["result"] == "failed: after 3 s, 0.05 minutes in all"
    everything = read(tmp_path / "gpu_x.json").rows
    assert [row["part"] for row in everything].count("right") == 5
    assert all(row["machine"] == MACHINE for row in everything)


def test_operators_end_where_no_process_gets_to_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(gpu, "gpu_machine", lambda: MACHINE)
    monkeypatch.setattr(gpu, "result_file", lambda folder: folder / "gpu_x.json")
    monkeypatch.setattr(gpu, "state", lambda: "")
    rows = gpu.run_all(("right", "ops"), tmp_path, 10.0)
    assert [row["result"] for row in rows] == ["failed: exit code 1"] * 4


def test_unreadable_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json: is not JSON"):
        read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match=r'"benchmark" is None, has to be one of ops,'):
        read(tmp_path / "x.json")
