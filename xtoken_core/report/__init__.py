"""Reports: the page of a run, the page that compares runs, and the few figures for a terminal and for KFP.

`Run.collect(...)` gathers what a run has left; `write_report` makes report.html and run.json of it; `write_comparison` puts several
runs side by side. `run.py` describes every file that is read.
"""

from xtoken_core.report.answer import answer_table, markdown, metrics
from xtoken_core.report.compare import write_comparison
from xtoken_core.report.page import write_report
from xtoken_core.report.run import Run

__all__ = ["Run", "answer_table", "markdown", "metrics", "write_comparison", "write_report"]
