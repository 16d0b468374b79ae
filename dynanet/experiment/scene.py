"""A whole hyperspectral scene, classified pixel by pixel: the map, what every pixel cost, and how long it took."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dynanet import report, zoo
from dynanet.bench.timing import paired
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, forced, record
from dynanet.core.trace import Trace
from dynanet.data.indian_pines import IndianPines
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.session.session import Session

PRICED = 16  # prices are those of a square with this side: they grow with the pixels, and measuring runs everything


def classified(model: EarlyExit, pines: IndianPines, *, rounds: int = 3) -> tuple[report.SceneMaps, dict[str, float]]:
    """Classify every pixel at the model's thresholds, with the stem run once over the image.

    Args:
        model: a calibrated classifier of the scene's patches.
        pines: the scene.
        rounds: how often it is timed.

    Returns:
        Maps; and seconds, beside those of the full model run the same way, interleaved in one process, with the share
        of its MACs that was spent.
    """
    cube = pines.cube[None]
    form = zoo.scene_form(model, pines.patch)
    session = Session(form, cube, batches=(1,))
    cost = CostModel(form, cube[..., :PRICED, :PRICED])

    def in_full() -> None:
        with forced(session, everything):
            session(cube)

    seconds = _interleaved({"seconds": lambda: session(cube), "full_seconds": in_full}, rounds=rounds)
    with record(session) as trace:
        logits = session(cube)
    spent = _spent_per_pixel(trace, cost, cube)
    most_expensive = cost.always / PRICED**2 + sum(float(prices.sum()) for prices in cost.unit.values())
    seconds["speed_up"] = seconds["full_seconds"] / seconds["seconds"]
    seconds["macs_share"] = float(spent.mean() / most_expensive)
    maps = report.SceneMaps(
        colour=(255 * pines.rgb()).round().byte().numpy(),
        predicted=logits[0].argmax(-1).numpy(),
        spent=(spent / most_expensive).numpy(),
        truth=pines.labels.numpy(),
        tested=pines.mask("test").numpy(),
        about="AVIRIS, Indiana, pixels of 20 m, 200 bands",
    )
    return maps, seconds


def _interleaved(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return {name: float(np.median(seconds)) for name, seconds in paired(contestants, rounds=rounds).items()}


def _spent_per_pixel(trace: Trace, cost: CostModel, cube: Tensor) -> Tensor:
    """(H, W) MACs: the stem and first exit everywhere, the later stages where they ran."""
    height, width = cube.shape[2:]
    spent = torch.full((height, width), cost.always / PRICED**2, dtype=torch.float64)
    for call in trace.calls:
        prices = cost.unit[call.name][call.first : call.first + call.keep.shape[-1]]
        spent += (call.keep[0].double() * prices).sum(-1)
    return spent
