"""Folders in which weights wait for a sampler."""

import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

import psutil


def scratch_folder(prefix: str, root: str) -> Path:
    """A new folder in `root`; when that is empty in memory (/dev/shm), else in the temporary folder.

    Its name has this process's id and machine. So the next call removes what a killed process of this machine left.
    """
    in_memory = os.access("/dev/shm", os.W_OK)
    parent = Path(root or ("/dev/shm" if in_memory else tempfile.gettempdir()))
    machine = platform.node()
    own = re.compile(rf"{prefix}(\d+)-{re.escape(machine)}-[^-]+")
    for left in parent.glob(f"{prefix}*"):
        if (found := own.fullmatch(left.name)) and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-{machine}-", dir=parent))
