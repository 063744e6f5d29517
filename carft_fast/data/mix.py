"""Several training files, each with its share of the rows."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

from carft_fast.core import InputError

T = TypeVar("T")


def mix_rows(files: Mapping[str, Sequence[T]], shares: Mapping[str, float], limit: int | None = None) -> list[T]:
    """As many rows as the shares (divided by their sum) allow with no row twice, at most `limit`: from the top of each
    file, one file after the other. The counts are within one row of the shares.

    Raises InputError for a file that would get none.
    """
    exact = {name: Fraction(str(share)) for name, share in shares.items()}  # 0.7 is 7/10
    whole = sum(exact.values())
    parts = {name: share / whole for name, share in exact.items()}
    total = min(int(len(files[name]) / part) for name, part in parts.items())
    total = total if limit is None else min(total, limit)
    counts = {name: int(total * part) for name, part in parts.items()}
    nearest = sorted(parts, key=lambda name: counts[name] - total * parts[name])  # largest remainder first
    for name in nearest[: total - sum(counts.values())]:
        counts[name] += 1
    if empty := [name for name, count in counts.items() if not count]:
        raise InputError(
            f"data.mix: with share {shares[empty[0]]:g} of {float(whole):g} {empty[0]} would get none of {total} rows; "
            f"usable are {', '.join(f'{len(rows):,} of {name}' for name, rows in files.items())}"
        )
    return [row for name, count in counts.items() for row in files[name][:count]]
