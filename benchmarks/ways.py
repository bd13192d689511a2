"""The plain way of published research code and ours, doing the same computation; every difference is a switch."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from bmsn_zoo.config import SearchConfig
from bmsn_zoo.data import (
    AUGMENT,
    ORDER,
    SCORE_ORDER,
    Augmentation,
    DataSource,
    even_batches,
    normalise,
    random_stream,
    shuffled_batches,
    stratified_split,
)
from bmsn_zoo.layout import Layout
from bmsn_zoo.search_space import SearchSpace
from bmsn_zoo.strategies import create_strategy
from bmsn_zoo.supernet import Mixture, count_correct


@dataclass(frozen=True)
class Way:
    """How to do the same computation; the defaults are the plain way."""

    device_augmentation: bool = False
    channels_last: bool = False
    native_precision: bool = False
    scoring_without_gradients: bool = False
    prefix_tree: bool = False


PLAIN, OURS = Way(), Way(True, True, True, True, True)


class Ways:
    """A search's data and mixture, and the ways to run them."""

    def __init__(self, config: SearchConfig, accelerator: Accelerator) -> None:
        source = DataSource(config, torch.get_num_threads())
        self.config, self.accelerator, self.data = config, accelerator, source.train()
        labels = self.data.images.labels.numpy()
        weight, score = stratified_split(labels, 0.5, config.seed, "two halves")
        self.weight, self.score = self.data.images.select(weight), self.data.images.select(score)
        self.space = SearchSpace(config.model)
        everything = self.data.images.pixels
        assert everything is not None, "this benchmark keeps its images in memory"
        self.pil = [Image.fromarray(pixels.numpy()) for pixels in everything]
        to_tensor = [transforms.ToTensor(), transforms.Normalize(self.data.mean, self.data.std)]
        crop = transforms.RandomCrop(source.image_size, padding=config.crop_padding)
        self.train_transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *to_tensor])
        self.score_transform = transforms.Compose(to_tensor)

    def mixture(self, way: Way) -> tuple[Mixture, list[torch.optim.Optimizer]]:
        """Fresh supernets, and what trains them."""
        mixture = Mixture(self.space, self.config.mixture_size, len(self.data.label_names), 3, self.config.seed)
        memory = torch.channels_last if way.channels_last else torch.contiguous_format
        for supernet in mixture.supernets:
            supernet.to(memory_format=memory)  # type: ignore[call-overload]
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in mixture.supernets]
        return mixture, optimizers

    def precision(self, way: Way) -> torch.autocast:
        """The context that a forward pass runs in."""
        native = way.native_precision and self.accelerator.mixed_precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16, enabled=native)

    def _batches(self, way: Way, split: str, order: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.weight if split == "weight" else self.score
        if way.device_augmentation:
            augment = Augmentation(self.config.crop_padding, self.config.flip)
            crops = augment.draw(len(order), self.config.batch_size, random_stream(0, AUGMENT))
            for drawn, (pixels, labels) in zip(crops, images.batches(order), strict=True):
                if split == "weight":
                    pixels = augment(pixels, drawn)
                yield normalise(pixels, self.data.mean, self.data.std), labels
        else:
            transform = self.train_transform if split == "weight" else self.score_transform
            for positions in order:
                rows = images.rows[positions]
                yield torch.stack([transform(self.pil[row]) for row in rows]), images.labels[positions]

    def steps(self, way: Way, count: int, layout: Layout | None = None) -> float:
        """Seconds of a search step, the mean over some; of one layout if it is given."""
        mixture, optimizers = self.mixture(way)
        strategy = create_strategy(self.space, self.config)
        size = self.config.batch_size
        orders = [
            (shuffled_batches(len(images), size, random_stream(0, purpose)) * count)[:count]
            for images, purpose in ((self.weight, ORDER), (self.score, SCORE_ORDER))
        ]
        started = time.perf_counter()
        pairs = zip(self._batches(way, "weight", orders[0]), self._batches(way, "score", orders[1]), strict=True)
        for step, ((images, labels), (score_images, score_labels)) in enumerate(pairs):
            draw = strategy.draw(step, step / count, range(len(mixture)))
            supernet, optimizer = mixture.supernets[draw.supernet], optimizers[draw.supernet]
            supernet.set_layout(layout or self.space[draw.layout])
            with self.precision(way):
                logits = supernet(images)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            with self.precision(way), torch.set_grad_enabled(not way.scoring_without_gradients):
                correct = supernet(score_images).argmax(1) == score_labels
            strategy.update(draw, [float(correct.float().mean())])
        return (time.perf_counter() - started) / count

    def evaluation(self, way: Way, batches: int | None = None, supernets: int | None = None) -> float:
        """Seconds of evaluating all layouts of all or some supernets on the score split, or on some batches of it."""
        mixture, _ = self.mixture(way)
        order = even_batches(len(self.score), self.config.eval_batch_size, random_stream(0, SCORE_ORDER))[:batches]
        started = time.perf_counter()
        with self.precision(way), torch.set_grad_enabled(not way.scoring_without_gradients):
            for images, labels in self._batches(way, "score", order):
                for supernet in mixture.supernets[:supernets]:
                    if way.prefix_tree:
                        count_correct(supernet, self.space, images, labels)
                        continue
                    for layout in self.space:
                        supernet.set_layout(layout)
                        (supernet(images).argmax(1) == labels).sum()
        return time.perf_counter() - started
