"""The balanced mixture with scores in pairs: what supernets differ by on the same images, weighed by its evidence."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import SearchConfig
from ..errors import InputError
from ..search_space import SearchSpace
from .balanced import BalancedMixture
from .protocol import Draw


class PairedMixture(BalancedMixture):
    """The balanced mixture, whose assignments grow sharp with evidence instead of with the clock.

    Every step scores all M supernets on one batch with the drawn layout, before one of them is trained. What counts is
    by how much their accuracies differ from their mean: what makes a batch easy or hard cancels. For the n-th such
    observation of a layout, and b = `score_momentum`:

    - scores move to the accuracies by the weight w = max(1 - b, 1 / n), as a mean first, a moving average later; d are
      their differences from the layout's mean, whose variance is q times that of one observation: q <- (1 - w)^2 q
      + w^2, from 0;
    - noise: e are the differences just seen minus d before them, u of the layout is the same average of
      sum(e^2) / ((M - 1) (1 + q)), from n = 2 on. The variance of d is s^2 = q (u + mean of u) / 2: the few
      observations of one layout are backed by those of all;
    - signal: t^2 = mean(sum(d^2)) / (M - 1) - (1 + 2 sqrt(2 / D)) mean(s^2), at least 0, D being M - 1 times the number
      of layouts: what the differences vary by beyond what chance makes plausible. Means are over layouts seen twice;
    - the balanced softmax over supernets is of d times the sharpness sqrt(t^2 / (t^2 + s^2)) / s, at most
      `max_sharpness`: the mean of the true differences given what was seen, in their standard errors (empirical
      Bayes). It is 0 for a layout not yet seen twice.

    Noise alone leaves the assignment near uniform, however long it is looked at; a difference of many standard errors
    makes it sharp. A step costs M - 1 scorings more.

    Attributes:
        scores: smoothed accuracies, float64 tensor of shape (L, M).
    """

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        super().__init__(space, config)
        if config.mixture_size < 2:
            raise InputError("scores pairs compare supernets: give a mixture-size of 2 or more, or scores batch")
        self.scoring = "all"
        # for each layout: observations n, variance factor q, variance u
        self.state["evidence"] = self._evidence = torch.zeros(len(space), 3, dtype=torch.float64)

    def sharpnesses(self) -> np.ndarray:
        """Factor on the differences of every layout, (L,), see above."""
        count, factor, noise = self._evidence.numpy().T
        seen = count >= 2
        if not seen.any():
            return np.zeros(len(count))
        free = self.scores.shape[1] - 1
        error = factor * (noise + noise[seen].mean()) / 2
        plausible = (1 + 2 * np.sqrt(2 / (free * seen.sum()))) * error[seen].mean()
        signal = max(0.0, (self._differences()[seen] ** 2).sum(1).mean() / free - plausible)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.sqrt(signal / (signal + error) / error)
        return np.where(seen & (signal > 0), np.minimum(found, self.config.max_sharpness), 0.0)

    def sharpness(self, progress: float) -> float:
        """The mean over all layouts."""
        return float(self.sharpnesses().mean())

    def logits(self, progress: float) -> Tensor:
        """What the assignment is balanced from, shape (L, M)."""
        return torch.from_numpy(self._differences() * self.sharpnesses()[:, None])

    def _differences(self) -> np.ndarray:
        scores = self.scores.numpy()
        return scores - scores.mean(1, keepdims=True)

    def update(self, draw: Draw, accuracies: Sequence[float]) -> None:
        """Learn the accuracies of all supernets on one batch with the drawn layout."""
        row, (count, factor, noise) = self.scores[draw.layout].numpy(), self._evidence[draw.layout].tolist()
        seen = np.asarray(accuracies)
        weight = max(1 - self.config.score_momentum, 1 / (count + 1))
        if count:
            surprise = seen - seen.mean() - (row - row.mean())
            variance = float((surprise**2).sum()) / ((len(seen) - 1) * (1 + factor))
            noise += max(1 - self.config.score_momentum, 1 / count) * (variance - noise)
        row += weight * (seen - row)
        factor = (1 - weight) ** 2 * factor + weight**2
        self._evidence[draw.layout] = torch.tensor([count + 1, factor, noise], dtype=torch.float64)
