"""A run that is killed at a chosen moment, whatever else the machine does."""

import os
import subprocess
import sys

# The moment is counted in files that reach the disk.
_SCRIPT = """
import os, signal, sys
left, fsync = int(sys.argv[1]), os.fsync
def count(handle):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
os.fsync = count
from dymo_med.cli import main
main(sys.argv[2:])
"""


def killed(command, files):
    """Run a command line of ours, kill it when it writes its n-th file; return its exit code.

    Args:
        command: Without the program's name.
        files: n.
    """
    arguments = [sys.executable, "-c", _SCRIPT, str(files), *map(str, command)]
    return subprocess.run(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
