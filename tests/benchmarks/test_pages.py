"""The report's page and the tables of README, built from rows."""

import html
import importlib.util
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import long_run
from benchmarks import rows as rows_module
from benchmarks.ops import cases as op_cases
from benchmarks.report import ANOTHER_COMMIT, build, environment, exponent, load
from benchmarks.rows import COLUMNS, RESULTS, read, write
from benchmarks.step_report import BASELINE

from .rowcase import MACHINE, ROOT, committed, ops_file

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
