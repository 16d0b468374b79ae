"""The Indian Pines scene: a hyperspectral image, classified pixel by pixel."""

from dataclasses import dataclass

from dynanet.data.indian_pines import CLASS_NAMES, IndianPines
from dynanet.data.patch_augment import RotatePaste
from dynanet.datamodules.inputs import ImageInputs
from dynanet.datamodules.module import DataModule, Opened
from dynanet.train.batches import Batches


@dataclass(eq=False)
class IndianPinesDataModule(DataModule):
    """Patches of 9 x 9 pixels with 200 bands in 16 classes, AVIRIS, 1992; see `data.indian_pines`.

    The scene comes inside the tensorly package.

    Args:
        split: field_cut, whole_fields (harder), or random_pixels_leaky (training patches hold test pixels).
        seed: draws the split.
    """

    split: str = "field_cut"
    seed: int = 0

    def setup(self) -> Opened:
        """Read the scene and cut the patches."""
        scene = IndianPines(self.split, self.seed)
        train, held_out, test = (scene.patches(part) for part in ("train", "val", "test"))
        augment = RotatePaste()
        return Opened(
            title=f"Indian Pines, {self.split} split, seed {self.seed}",
            classes=CLASS_NAMES,
            inputs=ImageInputs(scene.cube.shape[0], (scene.patch, scene.patch)),
            train=Batches(
                train, self.batch, shuffle=True, drop_last=True, seed=self.shuffle_seed, collate=augment.collate
            ),
            held_out=Batches(held_out, 512),
            test=Batches(test, 512),
            scene=scene,
        )
