"""Relaxed searches, DARTS and GAEA: every unit works at all resolutions at once, and how much of each is learned."""

import time
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, max_pool2d

from . import cost
from .config import SearchConfig
from .errors import InputError
from .one_shot import OneShotSearch
from .optimizer import set_learning_rate
from .ranking import build_result
from .results import Ranking
from .run_folder import RunFolder
from .search_space import BACKBONES, SearchSpace
from .step import Lag, Trainer, accuracy_of, check_finite
from .unshared import weights_at

_FLOOR = 1e-5  # of a share under exponentiated gradients, from where it can still come back
_Batch = tuple[Tensor, Tensor]


class RelaxedSupernet(nn.Module):
    """A supernet whose units keep the size of their input, and work at all resolutions (paper, comparison with DARTS).

    Unit 0 runs as always. For each level l, every other unit max-pools its input l times, runs, and enlarges what it
    made by 2^l, repeating pixels; the sum over levels, weighed by `shares`, goes to the next unit. Where all shares are
    0 or 1 that is a path: it downsamples where the level rises, and repeats pixels where it falls.

    Args:
        supernet: of a backbone of U units and S scales that `max_pools`; its weights are used, not copied.
    """

    def __init__(self, supernet: Any) -> None:
        super().__init__()
        self.supernet = supernet

    def forward(self, images: Tensor, shares: Tensor) -> Tensor:
        """(B, in_chans, H, W) images, with sides that can be halved S - 1 times, and (U - 1, S) shares to logits."""
        x = weights_at(self.supernet, 0).forward_unit(images, 0, False)
        for unit, row in enumerate(shares, 1):
            inputs = [x]
            for _ in row[1:]:
                inputs.append(max_pool2d(inputs[-1], 2))
            mixed: Tensor | None = None
            for level in reversed(range(len(row))):  # smallest first: a sum is enlarged, instead of each part of it
                made = row[level] * weights_at(self.supernet, level).forward_unit(inputs[level], unit, False)
                mixed = made if mixed is None else made + interpolate(mixed, scale_factor=2)
            assert mixed is not None
            x = mixed
        return self.supernet.forward_head(x)


class ExponentiatedGradient(torch.optim.Optimizer):
    """Multiplicative steps of rows of shares, which stay positive and sum to 1 (GAEA, Li 2021)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """shares <- shares * exp(-lr * gradient), at least a floor, rescaled to sum to 1."""
        for group in self.param_groups:
            for shares in (p for p in group["params"] if p.grad is not None):
                moved = (shares.log() - group["lr"] * shares.grad).softmax(-1).clamp(_FLOOR)
                shares.copy_(moved / moved.sum(-1, keepdim=True))


class Architecture:
    """What a relaxed search learns beside weights: alpha, which says how much of each unit works at each level.

    It starts uniform. "darts" takes the softmax of alpha and Adam's steps; the shares of "gaea" are alpha itself, and
    its steps are `ExponentiatedGradient`'s.

    Args:
        space: of U units and S scales.
        config: `strategy` and `alpha_lr`.
        device: where the supernet is.

    Attributes:
        alpha: (U - 1, S), for all units but the first.
        optimizer: of alpha.
        own: None; there is one supernet.
    """

    own = None

    def __init__(self, space: SearchSpace, config: SearchConfig, device: torch.device) -> None:
        self.space, self.simplex = space, config.strategy == "gaea"
        shape = (space.backbone.num_units - 1, max(layout.num_scales for layout in space))
        start = torch.full(shape, 1 / shape[1] if self.simplex else 0.0, device=device)
        self.alpha = nn.Parameter(start)
        self.optimizer: Any = (
            ExponentiatedGradient([self.alpha], config.alpha_lr or 0.1)
            if self.simplex
            else torch.optim.Adam([self.alpha], config.alpha_lr or 0.01)
        )

    def shares(self) -> Tensor:
        """How much of each unit works at each level, (U - 1, S), rows sum to 1; gradients flow to alpha."""
        return self.alpha if self.simplex else self.alpha.softmax(-1)

    def projected_scores(self) -> Tensor:
        """For every layout, the sum over units of the logarithm of the share at its level, float64 (L,)."""
        logs = self.shares().detach().cpu().double().log()
        levels = torch.tensor([list(accumulate(layout.flags))[1:] for layout in self.space])
        return logs[torch.arange(len(logs)), levels].sum(1)

    def report(self, progress: float) -> dict[str, Any]:
        """The shares, which metrics.jsonl calls alpha as papers do."""
        return {"alpha": self.shares().tolist()}

    def result(self) -> dict[str, Any]:
        """The shares; the free path, which is each unit's largest level; the projected score of every layout."""
        scores = dict(zip(map(str, self.space), self.projected_scores().tolist(), strict=True))
        free = [0, *self.shares().argmax(1).tolist()]
        return {"details": {"alpha": self.shares().tolist(), "free_path": free, "projected_scores": scores}}

    def state_dict(self) -> dict[str, Tensor]:
        """Alpha, and what its optimizer keeps."""
        return {"alpha": self.alpha.detach(), **self.optimizer.state_dict()["state"].get(0, {})}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        state = dict(state)
        with torch.no_grad():
            self.alpha.copy_(state.pop("alpha"))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: state} if state else {}, "param_groups": groups})


def train_weights(trainer: Trainer, shares: Tensor, batch: _Batch, accelerator: Accelerator) -> Tensor:
    """One step of the weights on images of the weight split; alpha is only read. Returns the loss in nats."""
    images, labels = batch
    loss = cross_entropy(trainer.network(images, shares.detach()), labels)
    accelerator.backward(loss)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss.detach()


def train_alpha(
    relaxed: RelaxedSupernet, architecture: Architecture, batch: _Batch, accelerator: Accelerator
) -> Tensor:
    """One step of alpha on images of the score split; weights are only read (first order). Returns the accuracy."""
    images, labels = batch
    logits = relaxed(images, architecture.shares())  # not the wrapped network: it would average weights' gradients
    accelerator.backward(cross_entropy(logits, labels), inputs=[architecture.alpha])
    if accelerator.num_processes > 1:
        architecture.alpha.grad = accelerator.reduce(architecture.alpha.grad, "mean")
    architecture.optimizer.step()
    architecture.optimizer.zero_grad()
    return accuracy_of(logits, labels)


class RelaxedSearch(OneShotSearch):
    """A search that trains all units at all resolutions in each step, and what they are mixed by (Liu 2019, Li 2021).

    Layouts are ranked by their projected scores, as the probability of each among all layouts if every unit's level
    were drawn from its shares. Their accuracies are measured beside that, with weights that were trained to be mixed.
    """

    strategy: Architecture

    def __init__(self, config: SearchConfig, folder: RunFolder, accelerator: Accelerator) -> None:
        super().__init__(config, folder, accelerator)
        config = self.config  # as the images complete it
        if config.mixture_size != 1:
            raise InputError(f"strategy {config.strategy} trains one supernet: give --mixture-size 1")
        backbone, size = self.space.backbone, self.source.image_size
        self.strategy = Architecture(self.space, config, self.device)
        levels = self.strategy.alpha.shape[1]
        if not backbone.max_pools:
            able = ", ".join(name for name, each in BACKBONES.items() if each.max_pools)
            raise InputError(
                f"strategy {config.strategy} needs a model that max-pools the inputs of its units: use {able}, "
                f"not {config.model}, whose strides have no counterpart at full size"
            )
        if size % 2 ** (levels - 1):
            raise InputError(
                f"image-size {size} cannot be halved {levels - 1} times, as strategy {config.strategy} does: "
                f"give a multiple of {2 ** (levels - 1)}"
            )
        if config.rate_decay == "cost":
            raise InputError(f"rate-decay cost: all steps of strategy {config.strategy} cost the same: use schedule")
        self.strategy.optimizer = accelerator.prepare_optimizer(self.strategy.optimizer)
        # forward and backward for the weights, and for alpha
        self.cost = 6 * config.batch_size * cost.relaxed_macs(backbone, levels, size, config.in_chans)
        self.count_costs([self.cost])

    def wrap(self, supernet: Any) -> nn.Module:
        """The supernet as its steps run it."""
        self.relaxed = RelaxedSupernet(supernet)
        return self.relaxed

    def run_dearest(self, supernet: Any, layout: Any, images: Tensor) -> Tensor:
        """Logits as every step makes them."""
        return self.relaxed(images, self.strategy.shares())

    def run(self) -> None:
        """All epochs, or what the budget pays for, then the last evaluation of every layout."""
        accelerator, trainer, alpha = self.accelerator, self.trainers[0], self.strategy
        spending = self.spending
        self.begin()
        epoch = self.folder.epoch
        while not spending.over(epoch * self.epoch_steps):
            started = time.monotonic()
            steps, bar = self.steps(epoch), self.batches(epoch)
            lag, sums = Lag[int](), np.zeros(3)

            for step, batch, score_batch in bar:
                self.evaluate_late(spending.late_due(step))
                progress = spending.progress(step)
                set_learning_rate(trainer.optimizer, self.learning_rate(step))
                loss_now = train_weights(trainer, alpha.shares(), batch, accelerator)
                values = torch.stack([loss_now, train_alpha(self.relaxed, alpha, score_batch, accelerator)])
                if accelerator.num_processes > 1:
                    values = accelerator.reduce(values, "mean")

                spending.own += self.cost
                last = step == steps[-1] or spending.over(step + 1)
                for done, (loss, accuracy) in lag.push(step, values, last):
                    check_finite(loss, epoch, done % self.epoch_steps)
                    sums += loss, accuracy, 1
                    bar.show(f"loss {loss:.3f}, scored {100 * accuracy:.1f} %")
                if last:
                    bar.count()
                    break  # before the epoch ends, if the budget does

            self.end_epoch(epoch, progress, sums, started)
            epoch += 1
        self.finish(epoch)

    def rank(self, accuracy_matrix: Tensor) -> Ranking:
        """All layouts by their probability."""
        probability = self.strategy.projected_scores().softmax(0).tolist()
        return build_result(self.space, accuracy_matrix, self.macs, probability=probability)
