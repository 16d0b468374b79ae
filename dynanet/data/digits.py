"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels in 10 classes, with one fixed split.

The test set of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998,
doi:10.24432/C50P49), part of the scikit-learn package: nothing is downloaded. The split is stratified: 1,077 to train,
360 for validation, 360 for test. Writers are not recorded and probably occur in all three parts, so accuracies are
optimistic for new writers.
"""

import torch

from dynanet.core.errors import DataError, require
from dynanet.data.images import ImageTensors
from dynanet.data.splits import stratified

SIZES = {"train": 1077, "val": 360, "test": 360}
SEED = 0  # the split is part of the dataset's definition; a test pins it


def load_digits(split: str) -> ImageTensors:
    """One part of the digits.

    Args:
        split: "train", "val" or "test".

    Returns:
        uint8 images (N, 1, 8, 8); the original grey levels 0..16 are scaled to 0..255.

    Raises:
        DataError: an unknown split.
        MissingExtraError: scikit-learn is not installed.
    """
    if split not in SIZES:
        raise DataError(f"split must be one of {', '.join(SIZES)}, got {split!r}")
    digits = require("sklearn.datasets", "images").load_digits()
    labels = torch.from_numpy(digits.target)
    rows = stratified(labels, list(SIZES.values()), SEED)[list(SIZES).index(split)]
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    return ImageTensors(images[rows], labels[rows], [str(digit) for digit in range(10)])
