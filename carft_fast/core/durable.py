"""Writes that a kill cannot spoil, folders that show damage, and disks that are full.

A folder is filled under a temporary name, sealed with a manifest of its files, synced to disk, then renamed. A killed
write leaves a name that begins with TEMPORARY. A file damaged later differs from the manifest.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carft_fast.core.errors import TrainingError

TEMPORARY = ".writing-"
"""What the name of an unfinished file or folder begins with."""
DAMAGED = "damaged-"
"""What the name of a folder that was set aside begins with."""
MANIFEST = "manifest.json"
"""Size in bytes and SHA-256 of every other file of a folder; the last file written."""

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_HASHING_THREADS = 8


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder through `write` and move it to `target`, all or nothing; an existing `target` is replaced.

    Raises TrainingError where the disk refuses.
    """
    with writing_folder(target) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        publish(temporary, target)


@contextmanager
def writing_folder(target: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """The temporary folder that `publish` will rename to `target`. An error deletes it, so that its space is free.

    Raises TrainingError like `writing`.
    """
    temporary = _temporary_of(target)
    with writing(target, needed_bytes):
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def read_json_lines(path: Path) -> list[Any]:
    """What `json.dumps(...) + "\n"` wrote: a value a line. Only "\n" ends one, for texts may hold U+2028 or U+0085."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # the last line may be cut, by a kill
    return [json.loads(line) for line in lines]


def _temporary_of(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY}{target.name}")


def publish(temporary: Path, target: Path) -> None:
    """Seal a written folder, make it durable, and move it into place."""
    _write_manifest(temporary)
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


def find_damage(folder: Path) -> str | None:
    """The first difference between a folder and its manifest, or None. Files that it does not list are ignored."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {folder / name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
        for path, (size, _) in expected.items():
            if not path.is_file():
                return f"{path.relative_to(folder)} is missing, its manifest lists it with {size:,} bytes"
            if (found := path.stat().st_size) != size:
                return f"{path.relative_to(folder)} has {found:,} bytes, its manifest says {size:,}"
        for path, found_hash in zip(expected, _hashes(list(expected)), strict=True):
            if found_hash != (wanted := expected[path][1]):
                return f"{path.relative_to(folder)} has SHA-256 {found_hash}, its manifest says {wanted}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    return None


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder so that nothing reads it again; returns its new path."""
    aside = folder.with_name(f"{DAMAGED}{folder.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{DAMAGED}{folder.name}-{number}")
    os.rename(folder, aside)
    _sync(folder.parent)
    return aside


def write_text(target: Path, text: str) -> None:
    """Replace a file in one move."""
    temporary = _temporary_of(target)
    with writing(target):
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, target)


@contextmanager
def writing(target: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns a disk's refusal, as whichever library words it, into a TrainingError that names `target`."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        needed = f"about {needed_bytes:,} bytes are needed, " if needed_bytes else ""
        raise TrainingError(
            f"{target} cannot be written: {refusal} ({needed}{_free_bytes(target):,} free). "
            "What a run saved before is whole: --resume goes on from its last checkpoint"
        ) from error


def _refusal(error: BaseException) -> str | None:
    """The operating system's message, where `error` or one of its causes came from it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen.strerror or str(seen)
        for refusal in map(os.strerror, _REFUSALS):  # safetensors and tokenizers have errors of their own
            if refusal in str(seen):
                return refusal
        seen = seen.__cause__ or seen.__context__
    return None


def _free_bytes(target: Path) -> int:
    path = target.absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(files, _hashes(files), strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")


def _hashes(files: list[Path]) -> list[str]:
    """In threads: hashlib releases the interpreter lock."""

    def sha256(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return list(pool.map(sha256, files))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
