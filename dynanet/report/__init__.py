"""Reports: accuracy, cost and exit rates from tables, as one HTML file.

findings = find(test_table, points, Origin(data=..., test=...), class_names, line=frontier.curve())
write_report(findings, "report.html")
"""

from dynanet.report.findings import Findings, Origin, Point, Timing, find
from dynanet.report.html import page, write_report
from dynanet.report.images import Box, ImageFindings, Shown
from dynanet.report.positions import BesideBoxes, beside_boxes, places, units_per_position
from dynanet.report.samples import Samples
from dynanet.report.scene import SceneMaps

__all__ = [
    "BesideBoxes",
    "Box",
    "Findings",
    "ImageFindings",
    "Origin",
    "Point",
    "Samples",
    "SceneMaps",
    "Shown",
    "Timing",
    "beside_boxes",
    "find",
    "page",
    "places",
    "units_per_position",
    "write_report",
]
