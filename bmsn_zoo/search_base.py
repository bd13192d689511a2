"""What every search begins and ends with: its layouts, its images in two halves, and its result."""

import logging
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from . import cost, report, runtime
from .command import out_of_memory
from .config import ALONE, SearchConfig, fit_to_images
from .data import DataSource, stratified_split
from .errors import InputError, first_line
from .layout import Layout
from .ranking import why_undecided
from .results import Latencies, LatencyResult, Ranking, SearchDataset, SearchResult
from .run_folder import RunFolder, save_tensors
from .search_space import SearchSpace

_log = logging.getLogger(__name__)
_LATENCY = "latency.json"  # in the run folder: what its space was cut by
_BATCH, _BATCHED_ON_CPU = 64, 2e10  # images; multiply-accumulates of them


class SearchBase:
    """A search as one of its processes does it; its kinds add how layouts are compared.

    Attributes:
        config: as the images complete it.
        space: the layouts to search, within what was allowed.
        data: the training images; the test images stay closed.
        halves: rows of the images that train weights, and of those that score layouts.
        latency: of the layouts, once it is measured.
    """

    latency: LatencyResult | None = None

    def __init__(self, config: SearchConfig, folder: RunFolder, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        space = SearchSpace(config.model, config.default_layout)
        self.source = DataSource(config, torch.get_num_threads())
        space.backbone.check(space.default_layout, self.source.image_size)
        if (config.confirm or config.strategy in ALONE) and not timm.is_model(config.model):
            what = "confirm" if config.confirm else f"strategy {config.strategy}"
            fix = "register it there, or search with one supernet or more and --confirm 0"
            raise InputError(f"{what} trains layouts alone, but timm has no model {config.model}: {fix}")
        limits = {"max_macs": config.max_macs, "max_activations": config.max_activations}
        self.space = space.within(self.source.image_size, config.in_chans, **limits)
        with PartialState().local_main_process_first():
            self.data = self.source.train()
        if accelerator.is_main_process:
            _log.info(self.source.summary())
        self.config = fit_to_images(config, len(self.data.images), accelerator.num_processes)
        labels, what = self.data.images.labels.numpy(), "a weight split and a score split"
        self.halves = stratified_split(labels, 0.5, config.seed, what, self.data.label_names)
        if config.max_latency is not None:
            self.latency = self._agreed_latency()
            costs = {layout: self.latency.single.of(layout) for layout in self.space}
            self.space = self.space.at_most(config.max_latency, costs, f"max-latency {config.max_latency:g}", " ms")
        if accelerator.is_main_process and len(self.space) < len(space):
            _log.info("%d of %d layouts cost no more than allowed", len(self.space), len(space))

    def macs(self, layout: Layout) -> int:
        """Multiply-accumulates of one image."""
        return self.space.macs(layout, self.source.image_size, self.config.in_chans)

    def begin_run(self) -> None:
        """Write what the run is, when nothing else can be refused."""
        runtime.begin_run(self.folder, self.config, self.source.identity(self.data), self.accelerator)
        if self.latency and not self.folder.dry and self.accelerator.is_main_process:
            self.latency.write(self.folder.path / _LATENCY)

    def _agreed_latency(self) -> LatencyResult:
        """What the first process measures, or what the run that is resumed began with: all cut the same space."""
        told: list[LatencyResult | None] = [None]
        if self.accelerator.is_main_process:
            known = self.folder.path / _LATENCY
            again = self.folder.epoch or known.exists()
            told = [LatencyResult.read(known) if again else self.measure_latency()]
        found = broadcast_object_list(told)[0]
        assert found
        return found

    def measure_latency(self) -> LatencyResult:
        """Latency of all layouts here, unit by unit, and of a sample of whole networks; in this run's precision.

        Of one image, and of 64 where that takes no more than some seconds: on CPUs, if these are up to 2 x 10^10
        multiply-accumulates with the dearest layout.
        """
        device, size, config = self.accelerator.device, self.source.image_size, self.config
        precision = self.accelerator.mixed_precision
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        classes = len(self.data.label_names)
        network = cost.deployable(self.space.backbone, classes, config.in_chans, device, dtype)
        by_cost = sorted(self.space, key=self.macs)
        dearest = self.macs(by_cost[-1])
        batches = [1] if device.type == "cpu" and _BATCH * dearest > _BATCHED_ON_CPU else [1, _BATCH]
        found = []
        with runtime.full_float32():
            for batch in batches:
                images = torch.randn(batch, config.in_chans, size, size, generator=torch.Generator().manual_seed(0))
                images = images.to(device, dtype, memory_format=torch.channels_last)
                parts = range(5) if batch == 1 else (1, 3)  # quarters of the layouts by cost
                sample = list(dict.fromkeys(by_cost[part * (len(by_cost) - 1) // 4] for part in parts))
                found.append(Latencies.of_times(batch, *cost.time_units(network, self.space, sample, images)))
        here = runtime.describe(self.accelerator)
        about = {key: here[key] for key in ("device", "hardware", "precision", "threads")}
        return LatencyResult(**about, torch=here["versions"]["torch"], batches=found)

    def why_undecided(self, found: Ranking) -> str | None:
        """Why no layout can be called the best, see `ranking.why_undecided`."""
        scored = self.data.images.labels.numpy()[self.halves[1]]
        return why_undecided(found, np.bincount(scored).max() / len(scored), len(scored))

    def write_result(self, found: Ranking, **about: Any) -> None:
        """Write search.json, the rows of the halves and the pictures, and finish the run.

        Args:
            found: the ranking.
            about: fields of `SearchResult` that a kind knows.
        """
        config, folder = self.config, self.folder
        rows = dict(zip(("weight_rows", "score_rows"), map(torch.from_numpy, self.halves), strict=True))
        save_tensors(folder.path / "split.safetensors", rows)
        if config.latency and not self.latency:
            try:
                self.latency = self.measure_latency()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                _log.warning("the latency of the layouts is not measured: out of memory (%s)", first_line(error))
        folder.touch()
        weight, score = map(len, self.halves)
        SearchResult(
            **dict(found),
            **folder.summary(),
            recipe=config.recipe,
            settings=config.settings(),
            seed=config.seed,
            dataset=SearchDataset(**self.source.describe(self.data), weight_images=weight, score_images=score),
            latency=self.latency,
            license=config.license,
            **about,
        ).write(folder.path / "search.json")
        report.draw_search(folder.path)
        folder.finish()
