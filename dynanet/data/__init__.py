"""Loaders of public formats, one per file, augmentation, and splits that do not leak.

Names are imported from their files when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynanet.data.annotated import AnnotatedImages
    from dynanet.data.augment import CropFlip, channel_stats, normalise, random_crop, random_flip
    from dynanet.data.buckets import BucketedBatches
    from dynanet.data.camvid import LabelMaps, load_camvid
    from dynanet.data.detection import DetectionTensors, Normalize, RandomResizedFlipBoxes
    from dynanet.data.digits import load_digits
    from dynanet.data.folder import load_folder
    from dynanet.data.images import Encoded, ImageFiles, Images, ImageTensors, to_float
    from dynanet.data.indian_pines import IndianPines, PixelPatches, RawScene, gather_patches, load_scene
    from dynanet.data.parquet import load_parquet
    from dynanet.data.patch_augment import RotatePaste
    from dynanet.data.ragged import Sequences, SequenceSet, as_sequences, as_videos, pad, trimmed, with_lengths
    from dynanet.data.segmentation import RandomResizedFlip, SegmentationTensors
    from dynanet.data.speech import load_spoken_digits, log_mel, read_wav
    from dynanet.data.splits import hold_out, stratified
    from dynanet.data.text import Sentences, TruncationWarning, Vocabulary, load_labelled_lines
    from dynanet.data.timeseries import load_time_series
    from dynanet.data.voc import Boxes, DetectionImages, load_voc

__all__ = [
    "AnnotatedImages", "Boxes", "BucketedBatches", "CropFlip", "DetectionImages", "DetectionTensors", "Encoded",
    "ImageFiles", "ImageTensors", "Images", "IndianPines", "LabelMaps", "Normalize", "PixelPatches",
    "RandomResizedFlip", "RandomResizedFlipBoxes", "RawScene", "RotatePaste", "SegmentationTensors", "Sentences",
    "SequenceSet", "Sequences", "TruncationWarning", "Vocabulary", "as_sequences", "as_videos", "channel_stats",
    "gather_patches", "hold_out", "load_camvid", "load_digits", "load_folder", "load_labelled_lines",
    "load_parquet", "load_scene", "load_spoken_digits", "load_time_series", "load_voc", "log_mel", "normalise",
    "pad", "random_crop", "random_flip", "read_wav", "stratified", "to_float", "trimmed", "with_lengths",
]  # fmt: skip

_FILES = {
    ".annotated": ("AnnotatedImages",),
    ".augment": ("CropFlip", "channel_stats", "normalise", "random_crop", "random_flip"),
    ".buckets": ("BucketedBatches",),
    ".camvid": ("LabelMaps", "load_camvid"),
    ".detection": ("DetectionTensors", "Normalize", "RandomResizedFlipBoxes"),
    ".digits": ("load_digits",),
    ".folder": ("load_folder",),
    ".images": ("Encoded", "ImageFiles", "ImageTensors", "Images", "to_float"),
    ".indian_pines": ("IndianPines", "PixelPatches", "RawScene", "gather_patches", "load_scene"),
    ".parquet": ("load_parquet",),
    ".patch_augment": ("RotatePaste",),
    ".ragged": ("SequenceSet", "Sequences", "as_sequences", "as_videos", "pad", "trimmed", "with_lengths"),
    ".segmentation": ("RandomResizedFlip", "SegmentationTensors"),
    ".speech": ("load_spoken_digits", "log_mel", "read_wav"),
    ".splits": ("hold_out", "stratified"),
    ".text": ("Sentences", "TruncationWarning", "Vocabulary", "load_labelled_lines"),
    ".timeseries": ("load_time_series",),
    ".voc": ("Boxes", "DetectionImages", "load_voc"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name from its file."""
    if name in _FILE_OF:
        return getattr(import_module(_FILE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
