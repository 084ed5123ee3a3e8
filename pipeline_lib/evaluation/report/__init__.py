"""The report: one self-contained HTML page over everything that led to a verdict.

`gather` reads the artifacts, `comparison` computes the models' figures, `views` puts them into
words, `charts` and `graph` draw, `page` renders the templates.
"""

from pipeline_lib.evaluation.report.page import build_report

__all__ = ["build_report"]
