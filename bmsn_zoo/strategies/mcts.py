"""Monte-Carlo tree search: layouts are leaves, and levels choose where the next downsampling is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import SearchConfig
from ..search_space import SearchSpace
from .protocol import Draw, Scoring
from .uniform import Uniform, step_rng


class TreeSearch(Uniform):
    """Walks from the root to a leaf by UCT, after a uniform phase (the paper's MCTS-UCB).

    A child with n visits of its parent's N is worth Q + exploration * sqrt(ln N / n); one without visits comes
    first. Rewards are score accuracies, smoothed into Q of every node of the path. Of M supernets, drawn uniformly,
    each has a tree of its own: M searches side by side. The paper's has one.

    Args:
        space: of L layouts.
        config: `mixture_size` M, `seed`, `draws` and `uniform_share` of the first phase, `exploration`, `mcts_momentum`
            and `mcts_temperature`.

    Attributes:
        state: of `Uniform`; visits and values (Q) of every node, (nodes, M), the root being node 0.
    """

    scoring: Scoring = "drawn"

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        super().__init__(space, config)
        nodes: dict[tuple[int, ...], int] = {(): 0}
        self.paths: list[list[int]] = []  # of every layout, from the root to its leaf
        self.children: dict[int, list[int]] = {}
        for layout in space:
            units = layout.units_per_scale  # the last downsampling settles the rest, so its level has the leaves
            keys = [units[:level] for level in range(max(1, len(units) - 1))] + [units]
            self.paths.append([nodes.setdefault(key, len(nodes)) for key in keys])
            for parent, child in zip(self.paths[-1], self.paths[-1][1:], strict=False):
                if child not in (below := self.children.setdefault(parent, [])):
                    below.append(child)
        self.leaves = {path[-1]: layout for layout, path in enumerate(self.paths)}
        self.state.update(visits=self.table(len(nodes)), values=self.table(len(nodes)))

    def draw(self, step: int, progress: float, owned: range) -> Draw:
        """Draw a supernet uniformly, then walk down its tree."""
        if progress < self.config.uniform_share:
            return super().draw(step, progress, owned)
        rng = step_rng(self.config, step)
        supernet, node = owned[int(rng.integers(len(owned)))], 0
        visits, values = (self.state[name][:, supernet].numpy() for name in ("visits", "values"))
        while below := self.children.get(node):
            worth = np.full(len(below), np.inf)
            seen = visits[below] > 0
            spread = np.sqrt(np.log(max(1.0, visits[node])) / visits[below][seen])
            worth[seen] = values[below][seen] + self.config.exploration * spread
            if self.config.mcts_temperature and seen.all():
                worth = worth / self.config.mcts_temperature + rng.gumbel(size=len(below))
            node = below[int(rng.choice(np.flatnonzero(worth == worth.max())))]
        return Draw(self.leaves[node], supernet)

    def update(self, draw: Draw, accuracies: Sequence[float]) -> None:
        """Count the visit and smooth the reward into every node of the path; the first visit's is taken as it is."""
        super().update(draw, accuracies)
        visits, values = self.state["visits"].numpy(), self.state["values"].numpy()
        nodes = self.paths[draw.layout], draw.supernet
        share = np.where(visits[nodes] > 0, 1 - self.config.mcts_momentum, 1.0)
        values[nodes] += share * (accuracies[0] - values[nodes])
        visits[nodes] += 1

    def result(self) -> dict[str, Any]:
        """Values of the leaves as scores, (L, M), and the leaf of every supernet that only the values lead to."""
        leaves, greedy = [path[-1] for path in self.paths], []
        for supernet in range(self.config.mixture_size):
            node, values = 0, self.state["values"][:, supernet]
            while below := self.children.get(node):
                node = max(below, key=lambda child: float(values[child]))
            greedy.append(str(self.space[self.leaves[node]]))
        details = {**super().result()["details"], "greedy_leaf": greedy}
        return {"scores": self.state["values"][leaves].tolist(), "details": details}
