"""What a library logs is in the run's log file, masked and in order, and nowhere on the screen."""

import logging
from pathlib import Path

import pytest

from carft_fast.core import library_log
from carft_fast.core.console import Console
from carft_fast.core.library_log import keep_off_screen


def test_lines_go_to_the_runs_log_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_log._log, "_path", None)  # as before this process's first run
    keep_off_screen("a_library", "INFO")
    logger = logging.getLogger("a_library.part")
    logger.warning("before there is a file, token=hf_%s", "a1" * 15)
    Console().log_to(tmp_path / "console.log")
    logger.info("first\nsecond \x1b[2J")
    logger.debug("below the level")
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines[:2]] == [
        "a_library.part WARNING: before there is a file, token=***",
        "a_library.part INFO: first",
    ]
    assert lines[2:] == ["    second \\x1b[2J"]
    assert capfd.readouterr() == ("", "")


def test_a_log_file_that_cannot_be_written_ends_no_library(tmp_path: Path) -> None:
    keep_off_screen("a_library", "INFO")
    Console().log_to(tmp_path / "gone" / "console.log")
    logging.getLogger("a_library").warning("said into nothing")
