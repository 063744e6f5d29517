"""A study: which arms are compared, and how they are judged, in a TOML file that is written before the first run."""

import tomllib
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field, ValidationError

from carft_fast.compare.runs import COMPARED, VARIABLE, Variant
from carft_fast.compare.stats import Judgement
from carft_fast.config import Section
from carft_fast.core import InputError, first_line


class Arm(Section):
    method: str
    """One of `carft-fast compare --methods`."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values on top of what the method sets: dotted key -> value."""


class Study(Section):
    config: str
    """Of all arms, relative to the study's file."""
    seeds: list[int] = Field(min_length=2)
    """Every arm runs with each of them; arms are compared seed by seed."""
    references: list[str] = Field(min_length=1)
    """Arms that all others are held against."""
    reach: float = Field(gt=0, lt=1)
    """Accuracy whose first evaluation is looked for: how many samples does it take?"""
    arms: dict[str, Arm] = Field(min_length=2)

    @property
    def variants(self) -> list[Variant]:
        return [Variant(arm.method, arm.set, name) for name, arm in self.arms.items()]

    @property
    def judgement(self) -> Judgement:
        return Judgement(self.references, self.reach)


def load_study(path: Path) -> Study:
    """Raises InputError naming the file, the key, the value seen and what is allowed."""

    def refuse(why: str) -> NoReturn:
        raise InputError(f"--study {path}: {why}")

    try:
        study = Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        refuse("; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()))
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"cannot be read: {first_line(error)}")
    if len(set(study.seeds)) < len(study.seeds):
        refuse(f"seeds = {study.seeds}: a seed appears twice")
    for name in study.references:
        if name not in study.arms:
            refuse(f'references: "{name}" is no arm; allowed: {", ".join(study.arms)}')
    for name, arm in study.arms.items():
        if arm.method not in COMPARED:
            refuse(f'arms.{name}.method = "{arm.method}": allowed: {", ".join(COMPARED)}')
        for key in arm.set:
            if key.partition(".")[0] not in VARIABLE:
                allowed = ", ".join(VARIABLE)
                refuse(f"arms.{name}.set: {key} is the same for all arms; allowed: the sections {allowed}")
    return study
