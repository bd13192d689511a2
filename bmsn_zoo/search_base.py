"""What every search begins and ends with: its layouts, its images in two halves, and its result."""

import logging
import sys
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from . import report, runtime
from .config import SearchConfig, fit_to_images
from .data import DataSource, stratified_split
from .ranking import why_undecided
from .results import Ranking, SearchDataset, SearchResult
from .run_folder import RunFolder, save_tensors
from .search_space import SearchSpace

_log = logging.getLogger(__name__)


class SearchBase:
    """A search as one of its processes does it; its kinds add how layouts are compared.

    Attributes:
        config: as the images complete it.
        space: the layouts to search, within what was allowed.
        data: the training images; the test images stay closed.
        halves: rows of the images that train weights, and of those that score layouts.
    """

    def __init__(self, config: SearchConfig, folder: RunFolder, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        space, self.source = (
            SearchSpace(config.model, config.default_layout),
            DataSource(config, torch.get_num_threads()),
        )
        space.backbone.check(space.default_layout, self.source.image_size)
        limits = {"max_macs": config.max_macs, "max_activations": config.max_activations}
        self.space = space.within(self.source.image_size, config.in_chans, **limits)
        with PartialState().local_main_process_first():
            self.data = self.source.train()
        if accelerator.is_main_process:
            _log.info(self.source.summary())
            if len(self.space) < len(space):
                _log.info("%d of %d layouts cost no more than allowed", len(self.space), len(space))
        self.config = fit_to_images(config, len(self.data.images))
        labels, what = self.data.images.labels.numpy(), "a weight split and a score split"
        self.halves = stratified_split(labels, 0.5, config.seed, what, self.data.label_names)

    def begin_run(self) -> None:
        """Write what the run is, when nothing else can be refused."""
        segment = {**runtime.describe(self.accelerator), "command": sys.argv}
        self.folder.begin(self.config, segment, self.source.identity(self.data), self.accelerator)

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
        folder.touch()
        weight, score = map(len, self.halves)
        SearchResult(
            **dict(found),
            **folder.summary(),
            recipe=config.recipe,
            settings=config.settings(),
            seed=config.seed,
            dataset=SearchDataset(**self.source.describe(self.data), weight_images=weight, score_images=score),
            **about,
        ).write(folder.path / "search.json")
        report.draw_search(folder.path)
        folder.finish()
