"""Which supernet a layout trains: pure functions on (L, M) float64 tensors of L layouts and M supernets."""

import numpy as np
import torch
from torch import Tensor


def assign(
    scores: Tensor, sharpness: float, tolerance: float = 1e-3, max_iters: int = 1000, offset: Tensor | None = None
) -> Tensor:
    """Balanced assignment: softmax of the scores over supernets, rescaled until all are used equally.

    The result is the fixed point of the paper's iteration (section 3.2: divide every column by its mean,
    renormalise every row), found in the log domain by Newton's method on its convex dual: rows
    softmax(sharpness * scores + offset), with one offset for each supernet that makes every usage 1/M. The plain
    iteration needs thousands of rounds for sharp scores, Newton's method a handful.

    Args:
        scores: finite accuracies in [0, 1], shape (L, M), L >= M or not.
        sharpness: factor on the scores before the softmax, at least 0; larger is more decided.
        tolerance: largest accepted relative deviation of a usage from 1/M.
        max_iters: Newton steps before giving up.
        offset: of every supernet, float64 (M,), where to start from and, changed in place, where this ended;
            0 if None. Near the solution, as after one more step of a search, no iteration is needed.

    Returns:
        p(supernet given layout), a new float64 tensor of shape (L, M) whose rows sum to 1.

    Raises:
        ValueError: if the scores are not a finite matrix, or the sharpness is negative or not finite.
        RuntimeError: if the iteration limit is reached; the message gives the deviation.
    """
    if scores.ndim != 2 or 0 in scores.shape or not torch.isfinite(scores).all():
        raise ValueError(f"scores of shape {tuple(scores.shape)} must be a finite (layouts, supernets) matrix")
    if not 0 <= sharpness < float("inf"):
        raise ValueError(f"sharpness {sharpness} must be a finite number of at least 0")
    logits = scores.double().numpy() * sharpness  # numpy: for matrices this small, torch's calls take most of the time
    num_layouts, num_supernets = logits.shape
    target = num_layouts / num_supernets
    place = np.zeros(num_supernets) if offset is None else offset.numpy()
    deviation = float("inf")

    def objective(place: np.ndarray) -> float:
        shifted = logits + place
        top = shifted.max(1)
        return float((top + np.log(np.exp(shifted - top[:, None]).sum(1))).sum() - target * place.sum())

    for step in range(max_iters):
        weights = np.exp(logits + place - (logits + place).max(1, keepdims=True))
        assignment = weights / weights.sum(1, keepdims=True)
        totals = assignment.sum(0)
        deviation = float(np.abs(totals / target - 1).max())
        if deviation <= tolerance:
            return torch.from_numpy(assignment)
        if (step < 4 and deviation > 0.1) or step % 8 == 7:
            # the plain iteration: robust far from the solution, where Newton's quadratic model does not hold
            place -= np.log(np.maximum(totals / target, 1e-300))
        else:
            hessian = np.diag(totals) - assignment.T @ assignment
            ridge = 1e-12 * target + 1e-3 * np.abs(totals - target).mean()
            direction = np.linalg.solve(hessian + ridge * np.eye(num_supernets), target - totals)
            before, slope, scale = objective(place), float(direction @ (totals - target)), 1.0
            while scale > 1e-10 and objective(place + scale * direction) > before + 1e-4 * scale * slope:
                scale /= 2
            place += scale * direction
        place -= place.mean()
    raise RuntimeError(f"no balanced assignment after {max_iters} steps: a usage is {deviation:.1%} off 1/M")


def update_score(scores: Tensor, layout: int, supernet: int, accuracy: float, momentum: float) -> None:
    """Move one score towards an accuracy, in place: W <- momentum * W + (1 - momentum) * a (paper, Algorithm 1)."""
    scores[layout, supernet] = momentum * scores[layout, supernet] + (1 - momentum) * accuracy
