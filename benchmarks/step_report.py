"""benchmarks/results/step_cpu.{json,md}: rows of `benchmarks.step` and `benchmarks.step_growth`, and what is read."""

import json
from typing import Any

from benchmarks.rows import RESULTS

FILE = RESULTS / "step_cpu.json"
BASELINE = "padded, recomputing"
"""Our padded baseline: the path that the others are compared with."""
ROLLOUT_VOCABULARY = 49_152
"""SmolLM2's, on the quickstart's model."""


def load() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {"cases": []}
    return found


def save(results: dict[str, Any]) -> None:
    """The report as well."""
    RESULTS.mkdir(exist_ok=True)
    FILE.write_text(json.dumps({"benchmark": "step", "schema": 1} | results, indent=1) + "\n")
    FILE.with_suffix(".md").write_text(report(results))


def report(results: dict[str, Any]) -> str:
    lines = [
        "# The training step on the CPU",
        "",
        "CARFT, two PPO epochs, float32, the same rollouts on every path. `log-probs`: the no-gradient pass (old",
        "log-probs, values, z_1, z_2, reference). `update`: two epochs of forward, backward and optimizer. Seconds are",
        "medians, with their range; `x` is our padded baseline (`padded, recomputing`: a device's rows at",
        "once, padded to the longest prompt plus the longest completion) over this. `step`",
        "adds `sampling`: vLLM and its weight sync for the fast paths, transformers' generate for the padded one,",
        "medians as well, counted by the completion token since the engines draw different samples. Utilisation:",
        "FLOPs that the fast path needs, over the time of both phases, over the matmul ceiling. Memory: peak of",
        "log-probs and first epoch above model, optimizer state and what the process held, with the gradients",
        "and, `beyond gradients`, without. Nothing here ran on a GPU.",
        "",
        "Where all rows are one micro-batch (`fast` without small ones) log-prob time includes the forward pass that",
        "the first update reuses, so read the two phases together. `alone`: an update that makes all its forwards",
        "itself, timed in the same turns; `added`: what log-probs add to it, both phases less that.",
        "`torch's matmuls`: without oneDNN, which the fast path takes in float32. `compiled`: `model.compile`, vLLM's",
        "model too, once a run and in no time here.",
    ]
    for case in results["cases"]:
        lines += case_lines(case)
    if "slope" in results:
        lines += growth_lines(results)
    return "\n".join(lines) + "\n"


def case_lines(case: dict[str, Any]) -> list[str]:
    base = next(row for row in case["rows"] if row["path"] == BASELINE)
    lines = [
        "",
        f"## {case['case']}: {case['rollouts']} rollouts, {case['tokens']} tokens of which "
        f"{case['completion_tokens']} in completions, {case['padded_tokens']} if padded to the longest",
        "",
        "| path | log-probs, s | x | added, s | x | update, s | x | alone, s | x | both, x "
        "| sampling, s | x | step, s | x | samples/s | completion tokens/s | utilisation "
        "| peak, MiB | x | beyond gradients, MiB | x |",
        "|" + " --- |" * 21,
    ]
    for row in case["rows"]:
        cells = [row["path"]]
        for phase in ("log-probs", "update"):
            low, high = row["range"][phase]
            cells += [
                f"{row['seconds'][phase]:.2f} ({low:.2f} to {high:.2f})",
                f"{base['seconds'][phase] / row['seconds'][phase]:.2f}",
            ]
            other = {"log-probs": "log_probs_added_seconds", "update": "update_alone_seconds"}[phase]
            cells += [f"{row[other]:.2f}", f"{base[other] / row[other]:.2f}"]
        cells.append(f"{sum(base['seconds'].values()) / sum(row['seconds'].values()):.2f}")
        sampling, of_base = (r["rollout_seconds"] + r["sync_seconds"] for r in (row, base))
        cells += [f"{sampling:.2f}", f"{of_base / sampling:.2f}"]
        cells += [f"{row['step_seconds']:.2f}", f"{base['step_seconds'] / row['step_seconds']:.2f}"]
        cells += [f"{row['samples_per_second']:.2f}", f"{row['completion_tokens_per_second']:.0f}"]
        cells += [f"{row['utilisation']:.0%}", f"{row['update_peak_extra_mb']:.0f}"]
        cells += [f"{base['update_peak_extra_mb'] / row['update_peak_extra_mb']:.1f}"]
        cells += [f"{row['beyond_gradients_mb']:.0f}"]
        cells += [f"{base['beyond_gradients_mb'] / row['beyond_gradients_mb']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Gradients {case['gradients_mb']} MiB.",
        f"Matmul ceiling {case['matmul_ceiling_gflops']} GFLOP/s, {case['repeats']} repeats; {case['machine']}",
    ]
    return lines


def growth_lines(results: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Growth",
        "",
        "Quickstart model, fast path, sequences of 128 tokens, log-probs and update, best of the repeats:",
        "",
    ]
    lines += ["| tokens per step | seconds | seconds per 1,024 tokens |", "| --- | --- | --- |"]
    lines += [
        f"| {r['tokens']} | {r['seconds']:.3f} | {r['seconds'] / r['tokens'] * 1024:.4f} |" for r in results["slope"]
    ]
    lines += [
        "",
        "Peak of a step (MiB) with the vocabulary; 2 layers of width 64, 2,048 tokens in one micro-batch. What is",
        "left of growth on the fast path is the gradient of the LM head, as large as the head:",
        "",
        "| vocabulary | LM head | fast | padded |",
        "| --- | --- | --- | --- |",
        *(f"| {r['vocabulary']} | {r['head_mb']} | {r['fast']} | {r['padded']} |" for r in results["vocabulary"]),
    ]
    for rows, what in (
        (
            results.get("rollouts", ()),
            "64 tokens of prompt and 64 of completion each; the\n"
            f"same model with a vocabulary of {ROLLOUT_VOCABULARY:,}; micro-batches of 1,024 tokens on the fast path:",
        ),
        (
            results.get("smollm2_rollouts", ()),
            "SmolLM2-135M on SVAMP, as vLLM sampled them; micro-batches of 2,048 tokens\non the fast path, or one:",
        ),
    ):
        if rows:
            lines += ["", f"Peak of a step (MiB) with the rollouts of a device, {what}", ""]
            paths = [key for key in rows[0] if key not in ("rollouts", "model", "machine", BASELINE)]
            lines += [f"| rollouts | {''.join(f'{path} | x | ' for path in paths)}{BASELINE} |"]
            lines += ["|" + " --- |" * (2 + 2 * len(paths))]
        for row in rows:
            ratios = {path: f"{row[BASELINE] / row[path]:.1f}" for path in paths if path in row}
            cells = [f"{row.get(path, 'not measured')} | {ratios.get(path, '')}" for path in paths]
            lines.append(f"| {' | '.join([str(row['rollouts']), *cells, str(row[BASELINE])])} |")
        if rows and "machine" in rows[-1]:
            lines += ["", rows[-1]["machine"]]
    return [*lines, "", f"Growth: {results['growth_machine']}"]
