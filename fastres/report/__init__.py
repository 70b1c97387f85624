"""Pages for a browser: results as charts and tables, and a network with where its time goes."""

from fastres.report.writing import write_report

__all__ = ["write_report"]
