"""The HTML report: the page, what its template is given, its charts, and the template itself."""

from adalora.report.html.page import build_report

__all__ = ["build_report"]
