"""Reports: the page of a run, the page that compares runs, and the few figures for a terminal and for KFP.

`run.Run.collect(...)` gathers what a run has left; `page.write_report` makes report.html and run.json of it; `compare.write_comparison` puts several
runs side by side. `run.py` describes every file that is read.
"""
