"""Folders with a manifest, and files that are written whole: what counts as damage."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from carft_fast.core.durable import find_damage, write_folder, write_text
from carft_fast.core.errors import TrainingError

from .damage import flip_bit, no_file_larger_than

DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda f: os.truncate(f / "w", 2), "w has 2 bytes, its manifest says 5"),
    "longer": (lambda f: (f / "w").write_bytes(b"12345x") and None, "w has 6 bytes, its manifest says 5"),
    "one bit": (lambda f: flip_bit(f / "w"), "w has SHA-256 "),
    "below": (lambda f: flip_bit(f / "sub" / "v"), "sub/v has SHA-256 "),
    "missing": (lambda f: (f / "w").unlink(), "w is missing, its manifest lists it with 5 bytes"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read: No such file"),
    "cut manifest": (lambda f: os.truncate(f / "manifest.json", 40), "manifest.json cannot be read"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text("[1]") and None, "manifest.json cannot be read"),
    "no files": (lambda f: (f / "manifest.json").write_text('{"files": {}}') and None, "manifest.json lists no file"),
    "nested": (lambda f: (f / "manifest.json").write_text("[" * 9**6) and None, "manifest.json cannot be read"),
    "endless": (
        lambda f: (f / "manifest.json").write_text('{"files": {"w": {"bytes": 1e999, "sha256": ""}}}') and None,
        "manifest.json cannot be read",
    ),
    "one more": (lambda f: (f / "chat_template.jinja").touch(), "chat_template.jinja is not in its manifest"),
    "one more below": (lambda f: (f / "sub" / "v.json").touch(), "sub/v.json is not in its manifest"),
    "outside": (lambda f: relist(f, "../b"), "lists ../b, which is outside"),
    "anywhere": (lambda f: relist(f, "/etc/passwd"), "lists /etc/passwd, which is outside"),
}


def relist(folder: Path, name: str) -> None:
    """A manifest that is right about a file it should not have."""
    (folder.parent / "b").write_bytes(b"12345")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"w"', json.dumps(name)))


def test_other_files_beside_those_of_the_manifest_are_no_damage(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", lambda folder: (folder / "w").write_bytes(b"12345") and None)
    (tmp_path / "a" / "README.md").touch()
    assert find_damage(tmp_path / "a") is None


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, name: str) -> None:
    damage, told = DAMAGES[name]

    def write(folder: Path) -> None:
        (folder / "w").write_bytes(b"12345")
        (folder / "sub").mkdir()
        (folder / "sub" / "v").write_bytes(b"123")

    write_folder(tmp_path / "a", write)
    assert find_damage(tmp_path / "a") is None
    damage(tmp_path / "a")
    assert told in (find_damage(tmp_path / "a") or "")


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """White space apart, a flipped bit in the manifest is damage."""
    write_folder(tmp_path / "a", lambda folder: (folder / "w").write_bytes(b"12345") and None)
    manifest = tmp_path / "a" / "manifest.json"
    content = manifest.read_bytes()
    entry = re.search(rb'"w": \{.*?\}', content, re.DOTALL)
    assert entry
    for place in range(*entry.span()):
        for bit in range(8):
            manifest.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            same_meaning = content[place : place + 1].isspace()
            assert find_damage(tmp_path / "a") or same_meaning, (place, bit)


def test_a_link_in_place_of_an_unfinished_text_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".writing-config.toml").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "config.toml", "seed = 0")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "config.toml").read_text() == "seed = 0"
    assert not (tmp_path / "config.toml").is_symlink()


def test_a_text_that_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    write_text(tmp_path / "samples.jsonl", "old")
    with no_file_larger_than(1000), pytest.raises(TrainingError, match=r"samples.jsonl cannot be written: File too la"):
        write_text(tmp_path / "samples.jsonl", "x" * 2000)
    assert (tmp_path / "samples.jsonl").read_text() == "old"
