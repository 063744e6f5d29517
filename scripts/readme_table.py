"""What README.md and docs/benchmarks.md show of the committed rows: `make readme` writes it.

--check compares only. --one-commit refuses rows that were measured on more than one commit, or on a changed tree.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no installed package

from benchmarks.pages import with_part  # noqa: E402
from benchmarks.rows import RESULTS, Row, commits_of, read, read_peers  # noqa: E402
from benchmarks.step_report import BASELINE  # noqa: E402
from carft_fast.reports import number  # noqa: E402

BEGIN, END = "<!-- measured: {}, written by scripts/readme_table.py -->", "<!-- measured: end -->"
WIDTH = 100
NAMES = ("peers", "step", "rollout", "ops", "trl_grpo", "sandbox")
"""The result files that are shown."""
MODEL = "SmolLM2-135M"
PADDED = "our padded baseline"
HEADS = ("linear_logprob", "linear_policy_loss")
PRODUCTS = "its three matmuls alone"
"""A variant of `benchmarks.ops` that is a bound and no competitor."""
SHOWN = (
    ("CARFT", "published CARFT step", "the published CARFT trainer"),
    ("ReFT", "published ReFT step", "the published ReFT trainer"),
    ("given completions", "TRL, completion positions", "TRL {trl}, which scores completions only"),
)
"""Of README: case, side and its name there."""
PATHS = {
    "fast": "8 prompts x 1 samples; packed, defaults",
    "fast, recomputing": "the same, activations recomputed",
}
"""Of README: the default, and the path that recomputes as the baseline does."""

Files = dict[str, list[Row]]


def load(folder: Path) -> Files:
    files = {name: folder / f"{name}_cpu.json" for name in NAMES}
    return {name: read_peers(file) if name == "peers" else read(file).rows for name, file in files.items()}


def only(rows: Iterable[Row], **wanted: Any) -> Row:
    (row,) = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return row


def commit(*rows: Row) -> str:
    return ", ".join(commits_of(rows))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.1f}"


# --- steps ------------------------------------------------------------------------------------------------------------


class Against:
    """One case of `benchmarks.peers`: a side against carft_fast, in the same rounds."""

    def __init__(self, peers: list[Row], case: str, side: str) -> None:
        rows = [row for row in peers if row["case"] == case]
        self.side, own = side, rows[0]["side"]
        self.seconds, self.memory = (
            [only(rows, side=name, measure=measure)["value"] for name in (own, side)]
            for measure in ("processor time of a step", "memory of a step")
        )
        self.times = only(rows, side=side, measure=f"processor time over {own}'s")["value"]
        self.work, self.notes, self.machine = (rows[0][name] for name in ("work", "notes", "machine"))
        self.commit = commit(rows[0])

    def cells(self) -> list[str]:
        of_both = ((self.seconds, "s", f"{self.times:.1f}"), (self.memory, "MiB", ratio(*reversed(self.memory))))
        return [
            cell
            for (ours, theirs), unit, times in of_both
            for cell in (f"{number(ours)} {unit}", f"{number(theirs)} {unit}", times)
        ]


def peers_table(files: Files) -> str:
    def order(row: Row) -> tuple[bool, bool, bool]:
        return (not row["case"].startswith(MODEL), not row["side"].startswith("published "), row["side"] == PADDED)

    found = []
    for case, side in dict.fromkeys((row["case"], row["side"]) for row in sorted(files["peers"], key=order)):
        if side.startswith("carft_fast"):
            continue
        against = Against(files["peers"], case, side)
        found.append([side, case, against.notes, *against.cells(), against.commit])
    heads = ("against", "case", "carft_fast's configuration", "time", "theirs", "x", "memory", "theirs", "x", "commit")
    return table(heads, found)


def phases(row: Row) -> float:
    return float(row["logprobs_s"] + row["update_s"])


def step_table(files: Files) -> str:
    rows = [row for row in files["step"] if "size" not in row]
    found = []
    for row in rows:
        base = only(rows, case=row["case"], path=BASELINE)
        pairs = [(phases(base), phases(row))]
        pairs += [(base[name], row[name]) for name in ("update_peak_mb", "beyond_gradients_mb")]
        cells = [
            cell
            for (theirs, ours), unit in zip(pairs, ("s", "MiB", "MiB"), strict=True)
            for cell in (f"{number(ours)} {unit}", ratio(theirs, ours))
        ]
        found.append([row["case"], PADDED if row is base else row["path"], *cells, commit(row)])
    heads = ("case", "path", "time", "x", "memory", "x", "beyond the gradients", "x", "commit")
    return table(heads, found)


def speed_table(files: Files) -> str:
    """README's five rows."""
    found = []
    for case, side, whose in SHOWN:
        a = Against(files["peers"], f"{MODEL}, {case}", side)
        seconds, their_seconds, times, memory, their_memory, less = a.cells()
        what = f"{'Dr.GRPO' if case == 'given completions' else case} step"
        ours, theirs = f"{seconds}, {memory}", f"{their_seconds}, {their_memory}: {whose.format(**a.machine)}"
        configuration = f"{a.work.split(', ')[0]}; {a.notes}"
        found.append([what, configuration, ours, theirs, times, less, a.commit])
    rows = [row for row in files["step"] if "size" not in row and row["case"] == MODEL]
    base = only(rows, path=BASELINE)
    for path, configuration in PATHS.items():
        row = only(rows, path=path)
        texts = [f"{number(phases(r))} s, {number(r['update_peak_mb'])} MiB" for r in (row, base)]
        times = [ratio(phases(base), phases(row)), ratio(base["update_peak_mb"], row["update_peak_mb"])]
        against = f"{texts[1]}: {PADDED}, activations recomputed"
        found.append(["CARFT, log-probs and update", configuration, texts[0], against, *times, commit(row, base)])
    return table(("SmolLM2-135M", "configuration", "carft_fast", "against", "time x", "memory x", "commit"), found)


# --- the rest ---------------------------------------------------------------------------------------------------------


def sampling_table(files: Files) -> str:
    rows, found = files["rollout"], []
    for row in rows:
        if row["engine"] == "hf":
            continue
        hf = only(rows, model=row["model"], dtype=row["dtype"], engine="hf")
        rates = [r["tokens_per_s"] for r in (row, hf)]
        cells = [row["model"], row["dtype"], row["engine"], *(f"{rate:,.0f}" for rate in rates)]
        found.append([*cells, ratio(*rates), commit(row, hf)])
    return table(("model", "dtype", "engine", "tokens/s", "transformers' generate", "x", "commit"), found)


def operators_table(files: Files) -> str:
    rows, found = files["ops"], []
    for case in dict.fromkeys(row["case"] for row in rows):
        operator, *shape = case.split(", ")
        if operator not in HEADS or "half" in case:
            continue
        ours = only(rows, case=case, variant=operator)
        for row in rows:
            if row["case"] != case or row["variant"] in (operator, PRODUCTS) or "p50_ms" not in row:
                continue
            cells = [f"`{operator}`", ", ".join(shape), row["variant"]]
            for figure, unit in (("p50_ms", "ms"), ("peak_mb", "MiB")):
                cells += [f"{number(r[figure])} {unit}" for r in (ours, row)] + [ratio(row[figure], ours[figure])]
            found.append([*cells, commit(ours, row)])
    trl = files["trl_grpo"]
    ours = only(trl, side="linear_policy_loss")
    for row in trl:
        if row is not ours:
            cells = ["`linear_policy_loss`", "in TRL's GRPOTrainer, SmolLM2-135M, 825 completion tokens"]
            cells += [f"its own head: {row['side']}", *(f"{number(r['seconds'])} s" for r in (ours, row))]
            found.append([*cells, f"{row['over_ours']:.1f}", "", "not measured", "", commit(ours, row)])
    heads = ("operator", "shape", "against", "time", "theirs", "x", "memory", "theirs", "x", "commit")
    slower = [
        f"`{row['case'].split(', ')[0]}` at {row['case'].split(', ', 1)[1]} ({row['plain_over_this']:.2f})"
        for row in rows
        if row["variant"] == row["case"].split(",")[0] and row.get("plain_over_this", 1) < 1
    ]
    words = f"Slower than plain torch in the same run: {', '.join(slower) or 'none'}."
    return f"{table(heads, found)}\n\n{filled(words)}"


def sandbox_table(files: Files) -> str:
    pool, fresh = (only(files["sandbox"], way=way) for way in ("pool", "fresh interpreter"))
    rates = [row["programs_per_s"] for row in (pool, fresh)]
    cells = [*(f"{rate:.0f}/s" for rate in rates), ratio(*rates), commit(pool, fresh)]
    return table(("programs", "a fresh interpreter each", "x", "commit"), [cells])


def filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def summary(files: Files) -> str:
    case, side, _ = SHOWN[0]
    a = Against(files["peers"], f"{MODEL}, {case}", side)
    ours, theirs = a.memory
    return filled(
        "carft_fast trains a language model to reason, from questions with annotated solutions: on "
        f"{MODEL} its CARFT step is **{a.times:.1f} times as fast** as the published trainer's and takes "
        f"**{ours / theirs:.0%} of its memory** beyond model and optimizer, on a CPU only so far."
    )


def operator_words(files: Files) -> str:
    times = {row["side"]: row["over_ours"] for row in files["trl_grpo"]}
    return filled(
        f"Forward and backward of {MODEL} on one CPU thread: TRL's own fused head, which holds no logits either, "
        f"takes {times['TRL, completion positions']:.2f} times as long where it scores completions only, as on a GPU, "
        f"and {times['TRL']:.2f} times where it scores every position, as on a CPU "
        f"(commit {commit(*files['trl_grpo'])})."
    )


PAGES: dict[str, dict[str, Callable[[Files], str]]] = {
    "README.md": {"summary": summary, "operator": operator_words, "speed": speed_table},
    "docs/benchmarks.md": {
        "peers": peers_table,
        "step": step_table,
        "sampling": sampling_table,
        "operators": operators_table,
        "sandbox": sandbox_table,
    },
}


def updated(name: str, text: str, folder: Path = RESULTS) -> str:
    files = load(folder)
    for block, write in PAGES[name].items():
        text = with_part(text, BEGIN.format(block), END, write(files), name)
    return text


def mixed(folder: Path = RESULTS) -> str:
    """The files and their commits, unless all rows are of one commit and of a clean tree."""
    commits = {name: commits_of(rows) or ["no commit"] for name, rows in load(folder).items()}
    every = {name for found in commits.values() for name in found}
    if len(every) == 1 and not every & {"no commit", "unknown"} and not min(every).endswith("-dirty"):
        return ""
    return "; ".join(f"{name}_cpu.json: {', '.join(found)}" for name, found in commits.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is not of the rows")
    parser.add_argument("--one-commit", action="store_true", help="write nothing unless all rows are of one commit")
    arguments = parser.parse_args()
    if arguments.one_commit and (found := mixed()):
        sys.exit(f"rows have to be of one commit and a clean tree; these are not. {found}")
    for name in PAGES:
        file = ROOT / name
        old = file.read_text(encoding="utf-8")
        new = updated(name, old)
        if arguments.check and new != old:
            sys.exit(f"{name}: its tables are not those of the rows; run make readme")
        if not arguments.check:
            file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
