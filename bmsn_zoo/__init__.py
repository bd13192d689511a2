"""Convolutional networks that downsample at better places, as timm models; importing this registers them."""

from .errors import InputError
from .layout import Layout
from .models import PoolingResNet
from .search_space import BACKBONES, Backbone, SearchSpace

__version__ = "0.1.0"
__all__ = ["BACKBONES", "Backbone", "InputError", "Layout", "PoolingResNet", "SearchSpace"]
