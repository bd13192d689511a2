"""Convolutional networks that downsample at better places, as timm models; importing this registers them."""

from . import usage
from .errors import InputError
from .layout import Layout

usage.answer_early()  # before what takes seconds to import

from .api import SearchResult, TrainResult, search, train  # noqa: E402
from .models import PoolingResNet, layout_of, relayout  # noqa: E402
from .search_space import BACKBONES, Backbone, SearchSpace, backbone_of  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "BACKBONES",
    "Backbone",
    "InputError",
    "Layout",
    "PoolingResNet",
    "SearchResult",
    "SearchSpace",
    "TrainResult",
    "backbone_of",
    "layout_of",
    "relayout",
    "search",
    "train",
]
