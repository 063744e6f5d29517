"""Time and memory of operators as one size doubles, ours against plain torch: `python -m benchmarks.growth`.

Writes benchmarks/results/growth_cpu.json; the exponents are fitted where the rows are shown.
"""

import argparse
import statistics

from benchmarks.op_cases import PLAIN, Case, linear_policy_loss, masked_infonce, three_products, three_similarities
from benchmarks.ops import add_clock, checked, clock_of, peaks_mb, timed
from benchmarks.rows import RESULTS, Row, this_machine, write

BASE = {"T": 512, "V": 8192, "D": 128}
LETTERS = {"tokens": "T", "vocabulary": "V", "hidden size": "D"}
DOUBLINGS = 4
BUDGET_SECONDS = 1.0


def sweeps() -> list[tuple[str, int, Case]]:
    """What grows, how large it is, and the case of that size."""
    found = []
    for against, letter in LETTERS.items():
        for step in range(DOUBLINGS):
            shape = BASE | {letter: BASE[letter] << step}
            found.append(
                (against, shape[letter], Case("linear_policy_loss", shape, linear_policy_loss, three_products))
            )
    for step in range(DOUBLINGS):
        n = 256 << step
        case = Case("masked_infonce", {"N": n, "D": 64}, masked_infonce, three_similarities)
        found.append(("embeddings in a group", n, case))
    return found


def measure(clock: str) -> list[Row]:
    rows: list[Row] = []
    for against, size, case in sweeps():
        variants = case.variants("cpu")
        steps, _ = checked({name: variants[name] for name in (case.operator, PLAIN)})
        times, peaks = timed(steps, "cpu", clock, BUDGET_SECONDS), peaks_mb(case, steps, "cpu")
        for name, found in times.items():
            rows.append(
                {
                    "operator": case.operator,
                    "against": against,
                    "size": size,
                    "variant": name,
                    "p50_ms": round(1e3 * statistics.median(found), 3),
                    "peak_mb": round(peaks[name], 2),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_clock(parser)
    arguments = parser.parse_args()
    machine = this_machine() | clock_of(arguments)
    write(RESULTS / "growth_cpu.json", "growth", machine, measure(arguments.clock))


if __name__ == "__main__":
    main()
