"""The timm models; importing this package registers them."""

from . import found
from .pooling_resnet import PoolingResNet

__all__ = ["PoolingResNet", "found"]
