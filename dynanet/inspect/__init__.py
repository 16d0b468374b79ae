"""Where the compute went, and whether the answers can be trusted: findings from tables, and a report in one file.

findings = find(test_table, choices, Origin(data=..., test=...), class_names, line=frontier.curve())
write_report(findings, "report.html")
"""

from dynanet.inspect.findings import Findings, Origin, Point, Timing, find
from dynanet.inspect.page import page, write_report
from dynanet.inspect.samples import Samples
from dynanet.inspect.scene import Scene

__all__ = ["Findings", "Origin", "Point", "Samples", "Scene", "Timing", "find", "page", "write_report"]
