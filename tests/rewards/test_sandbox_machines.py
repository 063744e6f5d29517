"""The sandbox's attacks again where the trainer is not root, or the kernel refuses namespaces.

Both by a user namespace around the tests: in it the trainer has an ordinary user's id and no capability, and where its
id is not mapped, or the namespace's limits are zero, the kernel refuses it namespaces of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .test_programs import WHOLE

ROOT = Path(__file__).resolve().parents[2]
USER = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
NO_MORE = 'for limit in /proc/sys/user/max_*_namespaces; do echo 0 > "$limit"; done; exec "$@"'
MACHINES = {
    "an ordinary user": (USER, WHOLE),
    "an ordinary user, namespaces refused": (("unshare", "--user"), (*WHOLE[:2], WHOLE[4])),
    "root without rights, namespaces refused": (
        ("unshare", "--user", "--map-root-user", "sh", "-c", NO_MORE, "sh"),
        WHOLE[:2],
    ),
}


@pytest.mark.skipif(
    subprocess.run([*USER, "true"], capture_output=True, check=False).returncode != 0,
    reason="this kernel refuses user namespaces: test_programs.py has run without them",
)
@pytest.mark.parametrize("machine", MACHINES)
def test_attacks_hold(machine: str, tmp_path: Path) -> None:
    around, defences = MACHINES[machine]
    result = subprocess.run(
        [
            *(*around, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'in'}"),
            *("tests/rewards/test_programs.py", "-k", "whole"),
        ],
        env=os.environ | {"CARFT_TEST_DEFENCES": ", ".join(defences)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    passed = re.search(r"^(\d+) passed, \d+ deselected in", result.stdout, re.MULTILINE)
    assert passed, result.stdout[-4000:]
    assert int(passed[1]) > 140
