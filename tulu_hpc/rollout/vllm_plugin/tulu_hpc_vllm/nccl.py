"""vLLM's NCCL backend with our safeguards: the same requests, the same bytes.

A worker whose trainer went away in a broadcast would wait for it for ever, and with it every request to the engine;
here it aborts the communicator after `TULU_HPC_SYNC_SECONDS`. This has not run on NCCL.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.logger import init_logger

from tulu_hpc_vllm.safeguards import Safeguards

logger = init_logger("vllm.tulu_hpc")
DEADLINE_VARIABLE = "TULU_HPC_SYNC_SECONDS"
DEFAULT_SECONDS = 120.0


class NcclEngine(Safeguards, NCCLWeightTransferEngine):
    """The backend `tulu_hpc_nccl`."""

    model_update_group: Any

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join the trainer's group, after leaving the last one."""
        self.leave()
        super().init_transfer_engine(init_info)
        logger.info("weight updates: %d ranks over NCCL", init_info.world_size)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive and load one bucket.

        Raises:
            ValueError: refused before anything is received.
            RuntimeError: it did not come in time, and the group is gone.
        """
        self.check_announced(update_info.names, update_info.shapes)
        with self._deadline():
            super().receive_weights(update_info)
        self._received |= frozenset(update_info.names)

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        seconds = float(os.environ.get(DEADLINE_VARIABLE, DEFAULT_SECONDS))
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.leave()  # ends the kernel that waits

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if expired.is_set():
                raise RuntimeError(f"the trainer did not send the weights within {seconds:g} s; the group was left")

    def leave(self) -> None:
        """Abort the communicator, if there is one."""
        group, self.model_update_group = self.model_update_group, None
        if group is not None:
            group.destroy()  # aborts: in 0.25 shutdown() would only forget it

    def shutdown(self) -> None:
        """Leave the group."""
        self.leave()
