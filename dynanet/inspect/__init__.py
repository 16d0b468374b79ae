"""Where the compute went, and whether the answers can be trusted: findings from tables, and a report in one file.

findings = find(test_table, choices, Origin(data=..., test=...), class_names, line=frontier.curve())
write_report(findings, "report.html")
"""

from dynanet.inspect.findings import Findings, Origin, Point, Timing, find
from dynanet.inspect.images import Box, ImageFindings, Shown
from dynanet.inspect.page import page, write_report
from dynanet.inspect.positions import BesideBoxes, beside_boxes, places, units_per_position
from dynanet.inspect.samples import Samples
from dynanet.inspect.scene import Scene

__all__ = [
    "BesideBoxes",
    "Box",
    "Findings",
    "ImageFindings",
    "Origin",
    "Point",
    "Samples",
    "Scene",
    "Shown",
    "Timing",
    "beside_boxes",
    "find",
    "page",
    "places",
    "units_per_position",
    "write_report",
]
