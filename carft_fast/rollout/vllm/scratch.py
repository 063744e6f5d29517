"""Temporary folders that do not outlive their process by much: of weights for a sampler, and of servers."""

import os
import platform
import re
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import psutil

LONGEST_FOLDER = 107 - len(f"/{uuid.UUID(int=0)}")
"""Characters of a folder in which vLLM can make a socket."""


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


class Scratch:
    """A new temporary folder, for this user alone. It goes with `close`, or when this process ends in whatever way.

    After an exec it stays until the program that took this process's place has ended. Where the temporary folder's
    name is too long for sockets, it is in /tmp.
    """

    def __init__(self, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        if len(str(self.path)) > LONGEST_FOLDER and os.access("/tmp", os.W_OK):
            self.path.rmdir()
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
        theirs, self._held = os.pipe()  # what reads it sees its end when no process holds the other side any more
        os.set_inheritable(self._held, True)
        remove = 'exec 3<&0; (trap "" INT TERM HUP; cat <&3; rm -rf -- "$0") &'
        subprocess.run(
            ["/bin/sh", "-c", remove, str(self.path)],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            check=True,
        )
        os.close(theirs)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._held)
