"""What a step of the default layout's network spends its time on, and what its bare convolutions would take."""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from ways import OURS, Ways

# part of a step, and what its operators are called
_PARTS = {
    "convolutions": ("convolution", "mkldnn", "cudnn_conv"),
    "batch normalisation": ("batch_norm",),
    "ReLU": ("relu", "threshold", "clamp"),
    "additions": ("aten::add", "AccumulateGrad"),
    "max pooling": ("max_pool",),
    "casts and copies": ("copy_", "_to_copy", "aten::to"),
}


class DefaultNetwork:
    """A supernet with the default layout, one batch of noise, and its convolutions on their own."""

    def __init__(self, ways: Ways) -> None:
        mixture, _ = ways.mixture(OURS)
        self.ways, self.net = ways, mixture.supernets[0]
        self.net.set_layout(ways.space.default_layout)
        size = ways.data.image_size
        self.images = torch.randn(ways.config.batch_size, 3, size, size).to(memory_format=torch.channels_last)
        self.labels = torch.randint(0, len(ways.data.label_names), (len(self.images),))
        self.work = self._convolutions()

    def _convolutions(self) -> list[tuple[torch.Tensor, torch.Tensor, nn.Conv2d, torch.Tensor]]:
        """Input, weight, module and gradient of every convolution, in the precision of the network."""
        shapes: list[tuple[nn.Conv2d, torch.Size]] = []
        hooks = [
            module.register_forward_pre_hook(lambda module, inputs: shapes.append((module, inputs[0].shape)))
            for module in self.net.modules()
            if isinstance(module, nn.Conv2d)
        ]
        self.net(self.images)
        for hook in hooks:
            hook.remove()
        kind = torch.bfloat16 if self.ways.accelerator.mixed_precision == "bf16" else torch.float32
        work = []
        for module, shape in shapes:
            inputs = torch.randn(shape).to(kind, memory_format=torch.channels_last)
            inputs.requires_grad_(module is not self.net.conv1)
            weight = module.weight.detach().to(kind, memory_format=torch.channels_last).requires_grad_()
            output = nn.functional.conv2d(inputs, weight, None, module.stride, module.padding)
            work.append((inputs, weight, module, torch.randn_like(output)))
        return work

    def train(self) -> None:
        """Forward and backward."""
        with self.ways.precision(OURS):
            logits = self.net(self.images)
        nn.functional.cross_entropy(logits.float(), self.labels).backward()
        self.net.zero_grad()

    @torch.no_grad()
    def score(self) -> None:
        """Forward alone."""
        with self.ways.precision(OURS):
            self.net(self.images)

    def bare_train(self) -> None:
        """Forward and backward of the convolutions."""
        for inputs, weight, module, gradient in self.work:
            nn.functional.conv2d(inputs, weight, None, module.stride, module.padding).backward(gradient)
            inputs.grad = weight.grad = None

    @torch.no_grad()
    def bare_score(self) -> None:
        """Forward of the convolutions."""
        for inputs, weight, module, _ in self.work:
            nn.functional.conv2d(inputs, weight, None, module.stride, module.padding)

    def share_of_bare_convolutions(self) -> float:
        """Speed of forward and backward as a share of that of the convolutions."""
        return seconds(self.bare_train) / seconds(self.train)

    def bare_step_seconds(self) -> float:
        """Seconds of the convolutions of a search step, scoring included."""
        return seconds(self.bare_train) + seconds(self.bare_score)

    def compiled(self) -> float:
        """Speed of forward and backward with every unit compiled, over that without."""
        torch._dynamo.config.recompile_limit = 64  # all units are instances of one class
        before = seconds(self.train)
        for block in self.net.blocks:
            block.compile()
        try:
            return before / seconds(self.train)
        finally:
            for block in self.net.blocks:
                block._compiled_call_impl = None

    def profile(self) -> dict[str, float]:
        """Share of every part of a step in its time, scoring included."""
        self.train()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(10):
                self.train()
                self.score()
        totals = dict.fromkeys([*_PARTS, "all else"], 0.0)
        for event in profiler.key_averages():
            part = next((part for part, names in _PARTS.items() if any(n in event.key for n in names)), "all else")
            totals[part] += event.self_cpu_time_total
        return {part: round(time / sum(totals.values()), 3) for part, time in totals.items()}


def seconds(call: Callable[[], None], count: int = 10) -> float:
    """Mean time of a call, after one to warm up."""
    call()
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count
