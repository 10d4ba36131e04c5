"""One HTML page about a search, made from its folder alone."""

from hiertune.report.page import write_report

__all__ = ["write_report"]
