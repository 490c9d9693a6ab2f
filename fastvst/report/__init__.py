"""Static HTML pages: one file each, no script, no network."""

from fastvst.report.sft import write_report

__all__ = ["write_report"]
