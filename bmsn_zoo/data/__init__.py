"""Any Hugging Face image data set to splits, and splits to augmented batches on the device."""

from .batches import (
    AUGMENT,
    CHOICE,
    MIX,
    ORDER,
    SCORE_ORDER,
    Augmentation,
    ImageSet,
    check_batch_size,
    even_batches,
    normalise,
    random_stream,
    shuffled_batches,
    stratified_split,
    to_device,
)
from .pixels import channel_statistics, to_pixels
from .sources import DataSource, ImageData
