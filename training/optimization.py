"""AdamW with the paper's parameter groups, and its learning rate schedule."""

from __future__ import annotations

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_polynomial_decay_schedule_with_warmup

_NO_DECAY = ("norm", "position_embedding", "query_embedding", "prompt_embedding")


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter `name`: not to norms and position, query and prompt embeddings."""
    return not any(part in name for part in _NO_DECAY)


def make_optimizer(model: torch.nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """
    AdamW over the parameters that train.

    Args:
        model: whose parameters with a gradient are trained.
        learning_rate: of all of them.
        weight_decay: of those that `is_decayed` names (paper, section 4.1).

    Raises:
        ValueError: where nothing trains.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model trains: choose another `trainable`.")
    groups = [
        {"params": [parameter for name, parameter in trained if is_decayed(name)], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trained if not is_decayed(name)], "weight_decay": 0.0},
    ]
    on_gpu = trained[0][1].is_cuda
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=on_gpu or None)


def make_schedule(optimizer: Optimizer, steps: int, warmup_steps: int, power: float) -> LRScheduler:
    """Learning rate that rises linearly for `warmup_steps` and falls to 0 at `steps` as a polynomial of `power`."""
    return get_polynomial_decay_schedule_with_warmup(optimizer, warmup_steps, steps, lr_end=0.0, power=power)


__all__ = ["is_decayed", "make_optimizer", "make_schedule"]
