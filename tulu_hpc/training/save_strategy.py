"""Writing torch_dist files from this process.

megatron-core's own writer starts a multiprocessing manager by `spawn` (which re-imports the main module, seconds) and
forks a writer per file, to be able to save asynchronously. A synchronous save needs neither: torch's writer puts the
same files on disk from the training process, and the format that megatron reads stays the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

from tulu_hpc.parallel.layout import Groups


class InProcessSave(SaveShardedStrategy):
    """megatron's `torch_dist` format, written synchronously, one file per rank that has something to write."""

    def __init__(self, groups: Groups) -> None:
        super().__init__("torch_dist", 1)
        self._alone = groups.world_size == 1

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=torch_checkpoint.FileSystemWriter(str(checkpoint_dir), thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            no_dist=self._alone,
        )
