"""Writes that a kill cannot spoil, folders that show damage or are in use, and disks that are full.

A folder is filled under a temporary name, sealed with a manifest of its files, synced to disk, then renamed. A killed
write leaves a name that begins with TEMPORARY. A file damaged later differs from the manifest.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carft_fast.core.errors import InputError, TrainingError, first_line

TEMPORARY = ".writing-"
"""What the name of an unfinished file or folder begins with."""
DAMAGED = "damaged-"
"""What the name of a folder that was set aside begins with."""
MANIFEST = "manifest.json"
"""Size in bytes and SHA-256 of every other file of a folder; the last file written."""
LOCK = "run.lock"
"""Held while a process writes to a folder; it has that process's id and machine, and stays when the process ends."""

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_HASHING_THREADS = 8
_READ = (".json", ".safetensors", ".toml", ".jinja")
"""Kinds of files that libraries read where they find them: a folder has none that its manifest does not list."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_LOCK_SECONDS = 1.0
_held: set[int] = set()
"""Descriptors of this process's locks."""


@contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep every other process out of `folder` until the block or this process ends, in whichever way.

    Raises InputError, with the other's process id, where another one holds it. On a file system without locks `log` is
    told, and nobody is kept out.
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise InputError(f"{folder / LOCK}: cannot be written: {error.strerror}") from None
    _held.add(lock)
    try:
        _lock(folder, lock, log)
        yield
    finally:
        if lock in _held:  # not in a fork
            _held.remove(lock)
            os.close(lock)


def _lock(folder: Path, lock: int, log: Callable[[str], None]) -> None:
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # or `lock_holder` asks just now
            if time.monotonic() > end:
                raise InputError(_in_use(folder, lock)) from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log(f"{folder}: its file system has no locks ({error.strerror}): nothing keeps another run out of it")
            return
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)


def lock_holder(folder: Path) -> str | None:
    """Which process holds the folder, as a sentence. Asks without taking the lock, and writes nothing."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _in_use(folder, lock)
    except OSError:
        return None
    finally:
        os.close(lock)
    return None


def _in_use(folder: Path, lock: int) -> str:
    holder = os.pread(lock, 200, 0).decode(errors="replace") or "(it has not said which)"
    return f"{folder} is in use by process {holder}: wait until that ends, or name another folder"


def _close_locks() -> None:
    """In a fork: its copies would hold the locks when this process is gone."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_close_locks)


def is_empty(folder: Path) -> bool:
    """Whether a folder is missing, or has nothing but what a process leaves that is killed before its first file."""
    return not folder.is_dir() or all(p.name == LOCK or p.name.startswith(TEMPORARY) for p in folder.iterdir())


def write_folder(target: Path, write: Callable[[Path], None], about: Mapping[str, Any] | None = None) -> None:
    """Fill a folder through `write` and move it to `target`, all or nothing; an existing `target` is replaced.

    `about`: see `publish`. Raises TrainingError where the disk refuses.
    """
    with writing_folder(target) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        publish(temporary, target, about)


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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """What `json.dumps(...) + "\n"` wrote: an object a line. Only "\n" ends one, for texts may hold U+2028 or U+0085.

    Raises InputError for a whole line that is none.
    """
    *lines, _ = path.read_bytes().split(b"\n")  # the last line may be cut, by a kill
    return [_json_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises InputError for a file that is missing, or is no object in JSON."""
    try:
        return _json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({first_line(error)}): {_start(text)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected an object in JSON, found {_start(text)}")
    return found


def _start(text: bytes) -> str:
    return repr(text[:60].decode("utf-8", "replace")) + "..." * (len(text) > 60)


def _temporary_of(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY}{target.name}")


def publish(temporary: Path, target: Path, about: Mapping[str, Any] | None = None) -> None:
    """Seal a written folder, make it durable, and move it into place. `about`: more entries of its manifest."""
    _write_manifest(temporary, about or {})
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
    """The first difference between a folder and its manifest, or None.

    A file that the manifest does not list counts where libraries would read it (JSON, safetensors, TOML, Jinja); others
    are ignored.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        if not listed:
            return f"{MANIFEST} lists no file"
        expected = {folder / name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
        for name in listed:
            if os.pardir in Path(name).parts or Path(name).is_absolute():
                return f"{MANIFEST} lists {name}, which is outside"
        for path, (size, _) in expected.items():
            if not path.is_file():
                return f"{path.relative_to(folder)} is missing, its manifest lists it with {size:,} bytes"
            if (found := path.stat().st_size) != size:
                return f"{path.relative_to(folder)} has {found:,} bytes, its manifest says {size:,}"
        for path in sorted(path for place in {p.parent for p in expected} for path in place.iterdir()):
            if path.suffix in _READ and path not in expected and path != folder / MANIFEST:
                return f"{path.relative_to(folder)} is not in its manifest"
        for path, found_hash in zip(expected, _hashes(list(expected)), strict=True):
            if found_hash != (wanted := expected[path][1]):
                return f"{path.relative_to(folder)} has SHA-256 {found_hash}, its manifest says {wanted}"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises InputError."""
    return read_json_object(folder / MANIFEST)


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
        temporary.unlink(missing_ok=True)  # it may be a link that somebody has put there
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
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
            "Earlier checkpoints are intact: --resume goes on from its last checkpoint"
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


def _write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(files, _hashes(files), strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries, **about}, indent=2) + "\n", encoding="utf-8")


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
