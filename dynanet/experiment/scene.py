"""A hyperspectral scene, classified pixel by pixel: prices, the maps, and how long it takes."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dynanet import report, zoo
from dynanet.bench.timing import paired
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, forced, record
from dynanet.core.errors import StructureError
from dynanet.core.trace import Trace
from dynanet.data.indian_pines import IndianPines
from dynanet.session.session import Session

PRICED = 16  # side of the square that is priced: prices grow with the pixels, and measuring them runs everything


def exit_macs(model: nn.Module, scene: IndianPines) -> list[float] | None:
    """MACs per pixel that leaves at each exit, the stem run once per pixel; None: the model has no form for scenes.

    Without such a form every patch is computed on its own, and the prices of patches hold.
    """
    try:
        return zoo.scene_macs(model, _square(scene), scene.patch)
    except StructureError:
        return None


def static_macs(model: nn.Sequential, scene: IndianPines, patch: Tensor) -> float:
    """MACs per pixel of a network with one answer, its first module run once per pixel.

    Args:
        model: the stem, and what follows it.
        scene: the scene.
        patch: an example of the patches, (1, bands, P, P).
    """
    stem, rest = model[0], model[1:]
    return CostModel(stem, _square(scene)).full / PRICED**2 + CostModel(rest, stem(patch)).full


def classified(model: nn.Module, scene: IndianPines, *, rounds: int = 3) -> tuple[report.SceneMaps, dict[str, float]]:
    """Classify every pixel at the model's thresholds, with the stem run once over the image.

    Args:
        model: a calibrated classifier of the scene's patches, of `zoo.spectral_exit`.
        scene: the scene.
        rounds: how often it is timed.

    Returns:
        The maps; and the seconds (median), beside those of the full model run the same way, interleaved in one
        process, with the share of its MACs that was spent.

    Raises:
        StructureError: a model that has no form for scenes.
    """
    cube = scene.cube[None]
    form = zoo.scene_form(model, scene.patch)
    session = Session(form, cube, batches=(1,))
    cost = CostModel(form, _square(scene))

    def in_full() -> None:
        with forced(session, everything):
            session(cube)

    contestants: dict[str, Callable[[], object]] = {"seconds": lambda: session(cube), "full_seconds": in_full}
    seconds = {name: float(np.median(each)) for name, each in paired(contestants, rounds=rounds).items()}
    with record(session) as trace:
        logits = session(cube)
    spent = _spent_per_pixel(trace, cost, cube)
    most_expensive = cost.always / PRICED**2 + sum(float(prices.sum()) for prices in cost.unit.values())
    seconds["speed_up"] = seconds["full_seconds"] / seconds["seconds"]
    seconds["macs_share"] = float(spent.mean() / most_expensive)
    maps = report.SceneMaps(
        colour=(255 * scene.rgb()).round().byte().numpy(),
        predicted=logits[0].argmax(-1).numpy(),
        spent=(spent / most_expensive).numpy(),
        truth=scene.labels.numpy(),
        tested=scene.mask("test").numpy(),
        about="AVIRIS, Indiana, pixels of 20 m, 200 bands",
    )
    return maps, seconds


def _square(scene: IndianPines) -> Tensor:
    return scene.cube[None, :, :PRICED, :PRICED]


def _spent_per_pixel(trace: Trace, cost: CostModel, cube: Tensor) -> Tensor:
    """(H, W) MACs: the stem and first exit everywhere, the later stages where they ran."""
    height, width = cube.shape[2:]
    spent = torch.full((height, width), cost.always / PRICED**2, dtype=torch.float64)
    for call in trace.calls:
        prices = cost.unit[call.name][call.first : call.first + call.keep.shape[-1]]
        spent += (call.keep[0].double() * prices).sum(-1)
    return spent
