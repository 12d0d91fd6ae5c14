"""The end of a process that used torch.distributed: its exit code, output and atexit functions, but no teardown.

Shown with one process; the abort that it prevents needs a thread of gloo to lose a race and is not provoked here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, os, sys
import torch.distributed as dist
from tulu_hpc.cli import entry

class Witness:
    def __del__(self, write=os.write):  # called when the interpreter clears the modules
        write(1, b"torn down\\n")

witness = Witness()
atexit.register(print, "atexit ran")
if {distributed}:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def body():
    print("body ran")
    {ending}

entry.main = body
entry.entry()
"""


def run(ending: str, distributed: bool) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(ending=ending, distributed=distributed)
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=root
    )


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(0)", 0), ("sys.exit(85)", 85), ("raise OSError('disk')", 1)])
@pytest.mark.parametrize("distributed", [True, False])
def test_exit(ending: str, code: int, distributed: bool) -> None:
    result = run(ending, distributed)
    assert result.returncode == code, result.stderr
    assert "body ran" in result.stdout and "atexit ran" in result.stdout
    assert ("torn down" in result.stdout) is not distributed
    assert ("OSError: disk" in result.stderr) is (code == 1)
