"""One search step of a one-shot method: train on one batch, score on another. And how its values reach the host."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from .errors import InputError
from .layout import Layout

T = TypeVar("T")


class Trainer(NamedTuple):
    """A supernet and what trains it; `network` is the supernet as accelerate prepared it."""

    supernet: Any  # with `set_layout`, as `Mixture.supernets`
    network: nn.Module
    optimizer: AcceleratedOptimizer


def train_and_score(
    trainer: Trainer,
    layout: Layout,
    batch: tuple[Tensor, Tensor],
    score_batch: tuple[Tensor, Tensor] | None,
    accelerator: Accelerator,
    scored: Sequence[Any] | None = None,
) -> Tensor:
    """Train a supernet with one layout, then score the two on other images (paper, Algorithm 1).

    Args:
        trainer: changed by one optimizer step.
        layout: of this step.
        batch: normalised images (B, C, H, W) and labels (B,) to train on, on the device.
        score_batch: the same to score on; None where no score is asked for.
        accelerator: of this process.
        scored: the supernets to score with this layout, before the step, from which the trained one alone would gain;
            that one after its step if None.

    Returns:
        cross-entropy in nats, then the score accuracy of each scored supernet, a fraction, as one tensor on the device;
        without scores, the accuracy on the batch itself, before the step.
    """
    trainer.supernet.set_layout(layout)
    accuracies = _score(scored, layout, score_batch) if scored and score_batch else []
    images, labels = batch
    logits = trainer.network(images)
    loss = nn.functional.cross_entropy(logits, labels)
    accelerator.backward(loss)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if score_batch is None:
        accuracies = [accuracy_of(logits, labels)]
    elif not scored:
        accuracies = _score([trainer.supernet], layout, score_batch)
    return torch.stack([loss.detach(), *accuracies])


@torch.no_grad()
def _score(supernets: Sequence[Any], layout: Layout, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Accuracy of each supernet, not of the network that wraps it: there are no gradients to average."""
    images, labels = batch
    for supernet in supernets:
        supernet.set_layout(layout)
    return [accuracy_of(supernet(images), labels) for supernet in supernets]


def accuracy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of a batch that is classified correctly, on the device; logits (B, classes), labels (B,)."""
    return (logits.argmax(1) == labels).float().mean()


class Lag(Generic[T]):
    """Values on their way to the host, one step late: waiting for the step at hand would leave a GPU idle."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[T, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, about: T, values: Tensor, last: bool = False) -> Iterator[tuple[T, list[float]]]:
        """Send the values of a step, and take those that have arrived: of the step before, and at the end of all."""
        on_host = values.to("cpu", non_blocking=values.is_cuda)  # elsewhere nothing would say when they are there
        event = None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((about, on_host, event))
        while len(self._waiting) > (0 if last else 1):
            before, arrived, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            yield before, arrived.tolist()


def check_finite(loss: float, epoch: int, step: int) -> None:
    """Stop a run that has diverged.

    Args:
        loss: of one step, in nats.
        epoch: of the step, from 0.
        step: within the epoch, from 0.

    Raises:
        InputError: if the loss is not finite.
    """
    if not math.isfinite(loss):
        raise InputError(
            f"the loss became {loss} in epoch {epoch + 1}, step {step + 1}: try a lower lr, more warmup-epochs, or "
            "mixed-precision no"
        )
