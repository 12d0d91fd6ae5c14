"""SGD with momentum under megatron's optimizers: what their checkpoints expect of an optimizer's state.

SGD is there to prove layouts equal: its update is linear in the gradient, where Adam's divides by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CountedSGD(torch.optim.SGD):
    """torch's SGD that also counts its steps per parameter, as AdamW does; checkpoints compare the count."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
        return loss


def empty_state(parameter: Tensor) -> dict[str, Tensor]:
    """State before the first step; zero momentum gives the first step of torch, which starts with the gradient."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "momentum_buffer": torch.zeros_like(parameter, requires_grad=False),
    }


def under_adam_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with the names that `DistributedOptimizer` writes, whatever the optimizer is: momentum as `exp_avg`, and
    zeros that take no memory as `exp_avg_sq`. A state of Adam is returned as it is."""
    if "momentum_buffer" not in state:
        return state
    momentum = state["momentum_buffer"]
    return {"step": state["step"], "exp_avg": momentum, "exp_avg_sq": momentum.new_zeros(()).expand(momentum.shape)}
