"""`Mixture`: M supernets over one search space, and the exhaustive evaluation of their layouts."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout
from .search_space import SearchSpace, require_weights
from .unshared import UnsharedSupernet, weights_at


class Mixture:
    """M supernets of one search space (paper, section 3.2).

    Args:
        space: the layouts, and the backbone to build.
        mixture_size: M.
        num_classes: outputs of every supernet.
        in_chans: channels of the images.
        seed: supernet m starts from weights that depend on `seed` and m alone.
        sharing: whether a unit has one set of weights ("shared"), or one for each resolution, which start with the
            "same" values or at "random", see `UnsharedSupernet`.
        pretrained: start from the weights that timm knows for the backbone, classifiers apart.
        prepare: called with each network as it is made, to give it other weights.

    Raises:
        InputError: if it has none.
    """

    def __init__(
        self,
        space: SearchSpace,
        mixture_size: int,
        num_classes: int,
        in_chans: int,
        seed: int,
        sharing: str = "shared",
        pretrained: bool = False,
        prepare: Callable[[Any], None] | None = None,
    ) -> None:
        self.space, self.supernets = space, list[Any]()
        weights = {"pretrained": True} if pretrained else {}
        if pretrained:
            require_weights(space.name)
        levels = max(layout.num_scales for layout in space)

        def create() -> Any:
            network = space.backbone.create(num_classes=num_classes, in_chans=in_chans, **weights)
            if prepare:
                prepare(network)
            return network

        with torch.random.fork_rng(devices=[]):
            for index in range(mixture_size):
                torch.manual_seed((seed << 16) + index)
                shared = sharing == "shared"
                self.supernets.append(create() if shared else UnsharedSupernet(create, levels, sharing == "same"))

    def __len__(self) -> int:
        return len(self.supernets)

    def extract(self, layout: str | Layout, supernet: int) -> Any:
        """An independent copy of one supernet with one layout; it gives the same logits."""
        copy = deepcopy(self.supernets[supernet])
        copy.set_layout(layout)
        return copy

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of all supernets, contiguous on the CPU, each name starting with its supernet's index."""
        return {
            f"{index}.{name}": tensor.detach().cpu().contiguous()
            for index, supernet in enumerate(self.supernets)
            for name, tensor in supernet.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take weights as `state_dict` gives them; every name must be there and no other."""
        nn.ModuleDict({str(i): supernet for i, supernet in enumerate(self.supernets)}).load_state_dict(state)


def norms_of(supernet: nn.Module) -> str:
    """Which norms a supernet has, for the records."""
    kinds = set()
    for norm in supernet.modules():
        if isinstance(norm, nn.BatchNorm2d):
            source = "running statistics" if norm.track_running_stats else "statistics of the batch"
            kinds.add(f"{source}, {'with' if norm.affine else 'without'} scale and shift")
        elif "Norm" in type(norm).__name__:
            kinds.add(type(norm).__name__)
    return "; ".join(sorted(kinds)) or "none"


def walk_layouts(supernet: Any, space: SearchSpace, images: Tensor) -> Iterator[Tensor]:
    """Logits of one supernet with every layout, in the order of the search space.

    Layouts that agree on their first downsamplings share the activations up to there, so all of them are walked
    depth first as one tree: the numbers are those of one run for each layout, at a fraction of the cost, and no
    more activations are held than there are scales.

    Args:
        images: one batch, (B, in_chans, H, W); its own statistics normalise it.

    Yields:
        (B, num_classes) logits, one tensor for each layout.
    """

    def walk(x: Tensor, first: int, layouts: list[tuple[int, ...]], level: int = 0) -> Iterator[Tensor]:
        for unit in range(first, space.backbone.num_units):
            halving = [flags for flags in layouts if flags[unit]]
            if 0 < len(halving) < len(layouts):  # the space is sorted, so those that halve come first
                lower = weights_at(supernet, level + 1)
                yield from walk(lower.forward_unit(x, unit, True), unit + 1, halving, level + 1)
                halving, layouts = [], [flags for flags in layouts if not flags[unit]]
            level += bool(halving)
            x = weights_at(supernet, level).forward_unit(x, unit, bool(halving))
        yield supernet.forward_head(x)

    yield from walk(images, 0, [layout.flags for layout in space])


@torch.no_grad()
def count_correct(supernet: Any, space: SearchSpace, images: Tensor, labels: Tensor) -> Tensor:
    """Correctly classified images of one batch for every layout, an int64 tensor of shape (L,) on their device."""
    return torch.stack([(logits.argmax(1) == labels).sum() for logits in walk_layouts(supernet, space, images)])
