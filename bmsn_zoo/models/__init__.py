"""The timm models; importing this package registers them."""

from .pooling_resnet import PoolingResNet
from .timm_resnet import RelaidResNet, create_model, layout_of, relayout

from . import found  # isort: skip  # its models are made of those

__all__ = ["PoolingResNet", "RelaidResNet", "create_model", "found", "layout_of", "relayout"]
