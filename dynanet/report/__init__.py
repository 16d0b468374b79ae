"""Reports: accuracy, cost and exit rates from tables, as one HTML file.

findings = find(test_table, points, Origin(data=..., test=...), class_names, line=frontier.curve())
write_report(findings, "report.html")
"""
# ruff: noqa: F401  (the public names)

from dynanet.report.findings import Findings, Origin, Point, Timing, find
from dynanet.report.html import page, write_report
from dynanet.report.images import Box, ImageFindings, Shown
from dynanet.report.positions import BesideBoxes, beside_boxes, places, units_per_position
from dynanet.report.samples import Samples
from dynanet.report.scene import SceneMaps
