"""The report as one HTML file without scripts or external resources, for screens (light and dark) and print."""

import os
from collections.abc import Sequence
from pathlib import Path

from dynanet.core.files import write_atomically
from dynanet.report.cards import samples_section
from dynanet.report.costs import cost_section
from dynanet.report.findings import Findings
from dynanet.report.images import ImageFindings, image_sections
from dynanet.report.maps import scene_section
from dynanet.report.markup import Markup, join, tag
from dynanet.report.sections import (
    answer_section,
    classes_section,
    exits_section,
    origin_section,
    promise_section,
    reading_section,
)

# Even if markup from outside got into the text, nothing is loaded and no script runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(findings: Findings) -> str:
    """The report as HTML, with all text from outside escaped."""
    body = [
        answer_section(findings),
        scene_section(findings),
        cost_section(findings),
        exits_section(findings),
        classes_section(findings),
        samples_section(findings),
        promise_section(findings),
        reading_section(findings),
        origin_section(findings),
    ]
    return _document(findings.title, body)


def image_page(findings: ImageFindings) -> str:
    """The report of a task with answers per image position, as HTML, with all text from outside escaped."""
    return _document(findings.title, image_sections(findings))


def _document(title: str, body: Sequence[Markup | None]) -> str:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = [
        tag("meta", at={"charset": "utf-8"}),
        tag("meta", at={"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        tag("meta", at={"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("meta", at={"name": "color-scheme", "content": "light dark"}),
        tag("title", title),
        tag("style", Markup(style)),
    ]
    html = tag("html", tag("head", *head), tag("body", tag("main", *body)), at={"lang": "en"})
    return join([Markup("<!doctype html>\n"), html, Markup("\n")])


def write_report(findings: Findings | ImageFindings, path: str | os.PathLike) -> None:
    """Write the report atomically.

    Args:
        findings: of `find`, or of images.
        path: of the HTML file; its folder must exist.

    Raises:
        OSError: the disk is full or the folder cannot be written; an old report is untouched.
    """
    text = (page(findings) if isinstance(findings, Findings) else image_page(findings)).encode()
    write_atomically(path, lambda file: file.write(text))
