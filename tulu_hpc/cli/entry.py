"""How the program ends: `python -m tulu_hpc` and the `tulu-hpc` script are this."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import traceback
from typing import NoReturn

from tulu_hpc.cli.main import main


def entry() -> NoReturn:
    """Run the command line; a process that used torch.distributed leaves without tearing the interpreter down.

    Threads of a process group outlive its last collective and may still have to release tensors. One that meets an
    interpreter which is being torn down aborts the process, so that a finished run would end with SIGABRT.
    """
    code: int | str | None = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        if not _used_distributed():
            raise
        traceback.print_exc()
    if not _used_distributed():
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by whoever read it
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _used_distributed() -> bool:
    """Whether a process group exists; torch is not imported to find out."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
