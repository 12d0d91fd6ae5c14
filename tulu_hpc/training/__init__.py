"""Training: step, optimizer, schedule, loss normalisation, checkpoints, reference log-probs, preemption."""

import tulu_hpc.parallel  # noqa: F401  (prepares megatron-core for the CPU before any module here imports it)
