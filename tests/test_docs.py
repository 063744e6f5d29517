"""The site of `make docs` has every guide and every public name."""

import re
from pathlib import Path

import yaml

import carft_fast
import carft_kernels

ROOT = Path(__file__).parents[1]
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]


def pages(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]


def test_every_guide_is_in_the_navigation_once_and_every_entry_is_there() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "kernels" / "README.md"]
    assert sorted(pages(NAV)) == sorted(file.relative_to(ROOT).as_posix() for file in files)


def documented(package: str) -> list[str]:
    """Names after `::: package.`, of names alone, not of modules with a list of members."""
    text = (ROOT / "docs" / "api" / f"{package}.md").read_text()
    return re.findall(rf"^::: {package}\.(?:\w+\.)*(\w+)\n(?! )", text, re.MULTILINE)


def test_every_public_name_has_its_docstring_in_the_site() -> None:
    assert sorted(documented("carft_fast")) == sorted(carft_fast._ROOM_OF)
    assert sorted(documented("carft_kernels")) == sorted(carft_kernels.__all__)
