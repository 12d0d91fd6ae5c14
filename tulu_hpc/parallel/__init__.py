"""Layout (tp, pp, vpp, cp, dp, sp), process groups, context-parallel split, and megatron-core on machines without CUDA.

Importing this package prepares megatron-core for the CPU where there is no CUDA (see `cpu_compat`), and the C library
for tensors there (`host_memory`); it does not import megatron-core itself. Every room that imports megatron therefore
imports this package first (in its `__init__`).
"""

import warnings

from tulu_hpc.parallel import cpu_compat, host_memory

cpu_compat.install()
host_memory.return_large_tensors()
host_memory.bound_primitive_caches()
# What megatron-core and torch's checkpoint code say about each other (a dozen lines per process), none of it about us.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent",
    "`load_state_dict` is deprecated and will be removed",
    "Please use DTensor instead and we are deprecating ShardedTensor",
):
    warnings.filterwarnings("ignore", message=_message)
