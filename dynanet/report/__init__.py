"""Reports: accuracy, cost and exit rates from tables, as one HTML file.

findings = find(test_table, points, Origin(data=..., test=...), class_names, line=frontier.curve())
write_report(findings, "report.html")

Names are imported when they are first used.
"""
# ruff: noqa: F401  (the public names)

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynanet.report.findings import Findings, Origin, Point, Timing, find
    from dynanet.report.html import page, write_report
    from dynanet.report.images import Box, ImageFindings, Shown
    from dynanet.report.positions import BesideBoxes, beside_boxes, places, units_per_position
    from dynanet.report.samples import Samples
    from dynanet.report.scene import SceneMaps

_WHERE = {
    **dict.fromkeys(("Findings", "Origin", "Point", "Timing", "find"), "dynanet.report.findings"),
    **dict.fromkeys(("page", "write_report"), "dynanet.report.html"),
    **dict.fromkeys(("Box", "ImageFindings", "Shown"), "dynanet.report.images"),
    **dict.fromkeys(("BesideBoxes", "beside_boxes", "places", "units_per_position"), "dynanet.report.positions"),
    "Samples": "dynanet.report.samples",
    "SceneMaps": "dynanet.report.scene",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
