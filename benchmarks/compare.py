"""Two result files of one machine, row by row: `python -m benchmarks.compare BASE HEAD`.

Prints HEAD over BASE for every figure that has a better direction, and exits with 1 if one is worse by more than the
band, or if a row of BASE is gone. Counted figures (registers, bytes, FLOPs) have no noise: their band is 0. Exits with
2, saying why, where the two cannot be compared.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import COLUMNS, Results, hardware, read
from carft_fast.core import InputError

BAND = 0.10


class Difference(NamedTuple):
    row: str
    figure: str
    base: float
    head: float
    worse: bool


def check_comparable(base: Results, head: Results) -> None:
    if base.benchmark != head.benchmark:
        raise InputError(f"BASE holds {base.benchmark}, HEAD {head.benchmark}: both have to be of one benchmark")
    first, second = ([hardware(machine) for machine in found.machines()] for found in (base, head))
    for machine in second:
        if machine not in first:
            seen = "; ".join(" ".join(f"{k}={v}" for k, v in m.items()) for m in first)
            named = " ".join(f"{k}={v}" for k, v in machine.items())
            raise InputError(f"HEAD was measured on {named}, BASE on {seen}: times of two machines are not compared")


def differences(base: Results, head: Results, band: float) -> Iterator[Difference | str]:
    """A Difference for each figure of both; a text for a row that is gone, or lacks a figure."""
    rows = {_name(row, head.key): row for row in head.rows}
    for old in base.rows:
        name = _name(old, base.key)
        new = rows.get(name)
        if new is None:
            yield f"{name}: gone from HEAD"
            continue
        for figure, column in COLUMNS.items():
            if not column.better or figure not in old:
                continue
            if figure not in new:
                yield f"{name}: HEAD has no {figure}{': ' + new['why'] if 'why' in new else ''}"
                continue
            limit = 0.0 if column.exact else band
            low, high = (old[figure], new[figure]) if column.better == "lower" else (new[figure], old[figure])
            yield Difference(name, figure, old[figure], new[figure], high > low + limit * abs(low))


def _name(row: dict[str, object], key: tuple[str, ...]) -> str:
    return ", ".join(str(row[part]) for part in key if part in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("head", type=Path, metavar="HEAD")
    parser.add_argument("--band", type=float, default=BAND, help=f"share that a timed figure may be worse by ({BAND})")
    parser.add_argument("--all", action="store_true", help="print the figures that did not change, too")
    arguments = parser.parse_args()
    try:
        if not 0 <= arguments.band < 1:
            raise InputError(f"--band {arguments.band}: has to be at least 0 and below 1")
        base, head = read(arguments.base), read(arguments.head)
        check_comparable(base, head)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    found = list(differences(base, head, arguments.band))
    bad = [entry for entry in found if isinstance(entry, str) or entry.worse]
    for entry in found:
        if isinstance(entry, str):
            print(entry)
        elif arguments.all or entry.head != entry.base:
            ratio = f"{entry.head / entry.base:.3f}" if entry.base else "from 0"
            print(f"{entry.row}: {entry.figure} {entry.base:g} -> {entry.head:g} ({ratio}){' WORSE' * entry.worse}")
    print(
        f"{len(found)} figures, {len(bad)} worse by more than {arguments.band:.0%} (counted ones: by anything) or gone"
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
