"""A network that timm does not have, made searchable: `accelerate launch examples/own_backbone.py --epochs 2`.

All that a search asks of a network is told in `bmsn_zoo.Backbone`. To train layouts alone, and so to confirm what was
found (left out here), register the network with timm under the same name, with `layout` among its arguments and
ordinary norms.
"""

import sys
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from bmsn_zoo import BACKBONES, Backbone, Layout
from bmsn_zoo.searching import main

CHANNELS = (16, 16, 32, 32, 64, 64)


class PlainNet(nn.Module):
    """Six convolutions in a row; an average pool halves what one gets, if it downsamples."""

    def __init__(self, num_classes: int, in_chans: int, device: Any = None) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.units = nn.ModuleList(
            nn.Sequential(  # norms of supernets use the batch at hand: their statistics would belong to no layout
                nn.Conv2d(before, after, 3, padding=1, bias=False, device=device),
                nn.BatchNorm2d(after, track_running_stats=False, device=device),
                nn.ReLU(),
            )
            for before, after in pairwise((in_chans, *CHANNELS))
        )
        self.fc = nn.Linear(CHANNELS[-1], num_classes, device=device) if num_classes else nn.Identity()
        self.set_layout("2-2-2")

    def set_layout(self, layout: str | Layout) -> None:
        """Downsample elsewhere from now on."""
        self.layout = Layout.parse(layout)

    def forward_unit(self, x: Tensor, unit: int, downsample: bool) -> Tensor:
        """Run one unit, whatever the layout is."""
        return self.units[unit](nn.functional.avg_pool2d(x, 2) if downsample else x)

    def forward_head(self, x: Tensor) -> Tensor:
        """The last unit's maps to logits."""
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        for unit, flag in enumerate(self.layout.flags):
            x = self.forward_unit(x, unit, bool(flag))
        return self.forward_head(x)


BACKBONES["plain_net"] = Backbone(PlainNet, CHANNELS, default_layout=Layout.parse("2-2-2"))

if __name__ == "__main__":
    sys.exit(main(["--model", "plain_net", "--confirm", "0", *sys.argv[1:]]))
