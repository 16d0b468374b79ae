"""scikit-learn's handwritten digits."""

from dataclasses import dataclass

from dynanet.data.digits import load_digits
from dynanet.datamodules.images import labelled_images
from dynanet.datamodules.module import DataModule, Opened


@dataclass(eq=False)
class DigitsDataModule(DataModule):
    """1,797 grey images of 8 x 8 pixels in 10 classes, in a fixed stratified split; see `data.digits`.

    The images come inside the scikit-learn package.
    """

    def setup(self) -> Opened:
        """Read the images. They are neither cropped nor mirrored: digits are not symmetric."""
        train, held_out, test = (load_digits(part) for part in ("train", "val", "test"))
        return labelled_images(
            "scikit-learn digits, fixed stratified split", train, held_out, test,
            batch=self.batch, seed=self.shuffle_seed, crop=0, flip=0,
        )  # fmt: skip
