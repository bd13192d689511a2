"""What turns gradients into steps: timm's optimizers, and the learning rate of every step."""

import difflib
import math
from collections.abc import Sequence

import numpy as np
import torch
from timm.optim import create_optimizer_v2, list_optimizers

from .config import SearchConfig, TrainConfig
from .errors import InputError


def create_optimizer(model: torch.nn.Module, config: SearchConfig | TrainConfig) -> torch.optim.Optimizer:
    """timm's optimizer of a config.

    Raises:
        InputError: if timm has none of this name, or it needs what our loops do not do.
    """
    try:
        optimizer = create_optimizer_v2(
            model, opt=config.opt, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    except (AssertionError, ValueError) as error:
        close = difflib.get_close_matches(config.opt, [*map(str, list_optimizers())], 3) or ["sgd", "momentum", "adamw"]
        fix = f"try {', '.join(close)}"
        raise InputError(f"opt {config.opt!r} cannot be used: {' '.join(str(error).split())}; {fix}") from None
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"opt {config.opt!r} needs gradients of gradients, which are not computed: use another")
    return optimizer


def learning_rate(
    config: SearchConfig | TrainConfig,
    epoch_steps: int,
    step: float,
    last: float | None = None,
    power: float | None = None,
) -> float:
    """Rate of a step, counted from 0 over all epochs.

    It grows linearly over the warm-up, is `lr` at the first step after it, and goes from there to `min_lr` at the
    very last step by half a cosine ("cosine") or a straight line ("poly"), or stays ("constant").

    Args:
        last: the very last step, where it is not that of the last epoch.
        power: if given, the rate is `lr` times this power of what is left of the way instead, at least `min_lr`.
    """
    if last is None:
        assert config.epochs
        last = config.epochs * epoch_steps - 1
    warmup = max(0, min(config.warmup_epochs * epoch_steps, last + 1 - epoch_steps))
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, last - warmup))
    if power is not None:
        return max(config.min_lr, config.lr * (1 - done) ** power)
    schedule = getattr(config, "sched", "cosine")  # the search's is always a cosine
    share = {"cosine": (1 + math.cos(math.pi * done)) / 2, "poly": 1 - done, "constant": 1.0}[schedule]
    return share * config.lr + (1 - share) * config.min_lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use a rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def decay_powers(config: SearchConfig, macs: Sequence[int]) -> list[float]:
    """The power with which each layout's learning rate decays: linear in the logarithm of its multiply-accumulates,
    from `gamma_cheap` to `gamma_dear` (DYNAS, CVPR 2025, where parameters are counted: layouts have equally many)."""
    logs = np.log(macs)
    return np.interp(logs, [logs.min(), logs.max()], [config.gamma_cheap, config.gamma_dear]).tolist()


def cost_quarters(macs: Sequence[int]) -> list[int]:
    """For each layout, in which quarter of them it is by cost, 0 being the cheapest."""
    return (np.argsort(np.argsort(macs, kind="stable")) * 4 // len(macs)).tolist()
