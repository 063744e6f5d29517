"""Writes that a kill cannot spoil: beside the target, made durable, then renamed into place."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".writing-"
"""What the name of an unfinished file or folder begins with."""


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder through `write` and move it to `target`, all or nothing; an existing `target` is replaced."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if target.exists():
        remove_folder(target)
    os.rename(temporary, target)
    _sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill half-way leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(f"{TEMPORARY}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def write_text(target: Path, text: str) -> None:
    """Replace a file in one move."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
