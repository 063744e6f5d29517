"""`make audit` against stand-ins for pip-audit: an answer counts only from a database that knows vulnerabilities."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "audit.py"
# what pip-audit 2.10.1 prints: findings on stdout with code 1; a database out of reach on stderr, with code 1 as well
KNOWS = "if grep -q '^jinja2==2.4.1$' $2; then echo 'jinja2 2.4.1 PYSEC-2019-217 2.10.1'; exit 1; fi\n"


@pytest.mark.parametrize(
    ("pip_audit", "code", "said"),
    [
        ("echo 'ConnectionError: no api.osv.dev' >&2; exit 1", 2, "nothing was audited.*no api.osv.dev"),
        ("echo 'No known vulnerabilities found' >&2; exit 0", 2, "nothing was audited.*jinja2"),
        (KNOWS + "echo 'No known vulnerabilities found' >&2; exit 0", 0, r"audit: \d+ packages, none known"),
        (KNOWS + "grep -q '^torch==[0-9.]*$' $2 && echo 'torch X'; exit 1", 1, "torch X(.|\n)*vulnerabilities found"),
        (KNOWS + "echo 'ConnectionError: reset' >&2; exit 1", 2, "nothing was audited.*reset"),
    ],
    ids=["no network", "a mirror without advisories", "safe", "vulnerable", "connection lost"],
)
def test_audit(tmp_path: Path, pip_audit: str, code: int, said: str) -> None:
    stand_in = tmp_path / "pip-audit"
    stand_in.write_text(f"#!/bin/sh\n{pip_audit}\n")
    stand_in.chmod(0o755)
    result = subprocess.run([sys.executable, str(SCRIPT), str(stand_in)], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    assert re.search(said, result.stdout + result.stderr), result.stdout + result.stderr
