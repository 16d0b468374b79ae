"""What the sets of labelled images share: a held-out part, standardisation, and augmentation."""

from collections.abc import Callable

from dynanet.core.errors import MissingSplitError
from dynanet.data.augment import CropFlip, channel_stats
from dynanet.data.images import Images, ImageTensors
from dynanet.data.splits import hold_out
from dynanet.datamodules.inputs import ImageInputs
from dynanet.datamodules.module import Opened
from dynanet.train.batches import Batches


def with_held_out(
    load: Callable[[str], Images], name: str, count: int | None, seed: int
) -> tuple[str, ImageTensors, ImageTensors, ImageTensors]:
    """The title, and the training, held-out and test images of a set that may have a validation split.

    Args:
        load: reads a split by name.
        name: of the set, for the title.
        count: images to hold out of the training split; None: the validation split, or a tenth where there is none.
        seed: draws the images to hold out.
    """
    train, test = (load(split).to_memory() for split in ("train", "test"))
    if count is None:
        try:
            return f"{name}, with its validation split", train, load("val").to_memory(), test
        except MissingSplitError:
            count = max(1, len(train) // 10)
    train, held_out = hold_out(train, count, seed=seed)
    return f"{name}, {count} training images held out, seed {seed}", train, held_out, test


def labelled_images(
    title: str, train: ImageTensors, held_out: ImageTensors, test: ImageTensors, *, batch: int, seed: int,
    crop: int, flip: float,
) -> Opened:  # fmt: skip
    """Images with a class each; training images are cropped and mirrored at random.

    Args:
        title: of the data.
        train: training images, whose statistics standardise all.
        held_out: for calibration.
        test: for the final figures.
        batch: training samples per step.
        seed: of order and augmentation.
        crop: pixels that a crop moves at most.
        flip: probability of mirroring.
    """
    mean, std = channel_stats(train.images)
    augment = CropFlip(mean, std, padding=crop, flip=flip)
    plain = CropFlip(mean, std, padding=0, flip=0.0)
    _, channels, height, width = train.images.shape
    return Opened(
        title=title,
        classes=train.classes,
        inputs=ImageInputs(channels, (height, width), tuple(mean.tolist()), tuple(std.tolist())),
        train=Batches(train, batch, shuffle=True, drop_last=True, seed=seed, collate=augment.collate),
        held_out=Batches(held_out, 256, collate=plain.collate),
        test=Batches(test, 256, collate=plain.collate),
    )
