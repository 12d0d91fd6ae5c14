"""Whitening of advantages over the global batch.  Shapes: K tokens of this rank."""

import torch
import torch.distributed as dist
from torch import Tensor


def whiten(
    advantages_K: Tensor,
    mask_K: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(A - mean) / sqrt(variance + eps), with mean and variance over the tokens of all ranks of `group`.

    One all-reduce of (sum, sum of squares, count) in fp64, where squares of fp32 numbers are exact: what cancels in the
    variance is below the rounding of the advantages themselves. Every rank gets bitwise the same statistics.

    Args:
        advantages_K: fp32 or fp64, any shape; not differentiated.
        mask_K: bool, the same shape: tokens where it is False do not count, and give 0.
        group: None: this process alone.
        shift_mean: False keeps the mean (reward models' scale matters: whitening of rewards in PPO).
        unbiased: variance over count - 1, as in TRL and open-instruct; False: over count.
        eps: added to the variance.

    Returns:
        the shape and dtype of advantages_K. Fewer than two tokens, or equal ones: variance 0.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device of the mask, dtype of the advantages, or eps.
    """
    if not advantages_K.is_floating_point():
        raise TypeError(f"advantages_K must be floating point, got {advantages_K.dtype}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if mask_K is not None:
        if mask_K.dtype != torch.bool:
            raise TypeError(f"mask_K must be bool, got {mask_K.dtype}")
        if mask_K.shape != advantages_K.shape or mask_K.device != advantages_K.device:
            raise ValueError(
                f"mask_K must be {list(advantages_K.shape)} on {advantages_K.device} as advantages_K, "
                f"got {list(mask_K.shape)} on {mask_K.device}"
            )
    advantages_K = advantages_K.detach()
    counted_K = advantages_K.double()
    if mask_K is not None:
        counted_K = counted_K.where(mask_K, 0)
        count = mask_K.sum().double()
    else:
        count = counted_K.new_tensor(float(counted_K.numel()))
    total_3 = torch.stack((counted_K.sum(), counted_K.square().sum(), count))
    if group is not None and group.size() > 1:
        dist.all_reduce(total_3, group=group)
    total, squares, count = total_3
    mean = total / count.clamp(min=1)
    centred = (squares - total * mean).clamp(min=0)
    variance = centred / (count - 1 if unbiased else count).clamp(min=1)
    white_K = (counted_K - mean) * (variance + eps).rsqrt()
    if not shift_mean:
        white_K = white_K + mean
    if mask_K is not None:
        white_K = white_K.where(mask_K, 0)
    return white_K.to(advantages_K.dtype)
