"""The HTML of a run's report: its data turned into sections, its template filled."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from xtoken_core.report import tables
from xtoken_core.report.cautions import cautions
from xtoken_core.report.charts import Measured, Spans, duration, interval_plot
from xtoken_core.report.curves import FIRST_TEACHER, STUDENT, TWIN, charts, phase_bars, run_seconds, task_bars
from xtoken_core.report.dag import dag_picture
from xtoken_core.report.facts import run_facts, teacher_facts
from xtoken_core.report.pilot import pilot_section
from xtoken_core.report.projection_summary import density_picture
from xtoken_core.report.run import Run
from xtoken_core.report.taught import taught_table
from xtoken_core.report.verdict import everybody, label, verdict
from xtoken_core.results.subject import BEFORE, BEST, LAST, TWIN_BEST, TWIN_LAST, Subject, teacher_subject
from xtoken_core.storage import RUN_FILE

SAMPLED = ((BEFORE,), (BEST, LAST), (TWIN_BEST, TWIN_LAST))
"""Whose text is shown: the first of each group that has any; teachers follow."""


def write_report(run: Run, folder: str | Path) -> Path:
    """Writes report.html (one self-contained file) and run.json (the data it was made from); returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run.save(folder / RUN_FILE)
    page = folder / "report.html"
    page.write_text(render_report(run), encoding="utf-8")
    return page


def render_report(run: Run) -> str:
    """The report of one run as HTML."""
    return render(
        "run.html",
        run=run,
        title=run.name,
        verdict=verdict(run),
        standing=standing(run),
        pilot=pilot_section(run.pilot),
        cautions=cautions(run),
        results=[table for make in _RESULTS if (table := make(run))],
        parts_of_groups=tables.parts_table(run),
        chart_groups=charts(run),
        dag=dag_picture(run.tasks),
        run_took=duration(took) if (took := run_seconds(run)) else "",
        task_bars=task_bars(run),
        phase_bars=phase_bars(run),
        overlap=tables.overlap_table(run.overlap),
        coverage=tables.coverage_table(run.overlap),
        teachers=[_teacher(run, teacher) for teacher in run.spec["teachers"]],
        samples=_samples(run),
        student=_published(run),
        settings=yaml.safe_dump(run.settings, default_flow_style=None, sort_keys=False, allow_unicode=True, width=54),
        facts=list(run_facts(run)),
        sources=[table for table in (tables.inputs_table(run), tables.corpora_table(run)) if table],
    )


_RESULTS = (tables.bits_table, tables.tasks_table, tables.agreement_table, taught_table)


def render(template: str, **values: Any) -> str:
    """A page of this package: the template filled, with the style and the script inside."""
    files = resources.files("xtoken_core.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        style=Markup((files / "style.css").read_text(encoding="utf-8")),
        script=Markup((files / "script.js").read_text(encoding="utf-8")),
    )
    return environment.get_template(template).render(**values)


def standing(run: Run) -> Spans | None:
    """Where everybody stands in bits per byte, with intervals."""
    rows: list[Measured] = []
    for result in everybody(run):
        measured = result.bits_per_byte
        if measured and measured.total is not None:
            rows.append((label(result.subject), color_of(run, result.subject), measured.total, measured.low, measured.high))
    return interval_plot("bits per byte of held-out text, lower is better", rows)


def color_of(run: Run, subject: Subject) -> int | None:
    """The palette's index for an evaluated model; None (grey) for the student before."""
    if subject.teacher is not None:
        return FIRST_TEACHER + run.teachers.index(subject.teacher)
    return None if subject == BEFORE else TWIN if subject.role == "baseline" else STUDENT


def _teacher(run: Run, teacher: dict[str, Any]) -> dict[str, Any]:
    """What the report shows of one teacher's vocabulary and projection."""
    name = teacher["id"]
    w = run.projections.get(name)
    return {
        "id": name,
        "color": color_of(run, teacher_subject(name)),
        "facts": list(teacher_facts(run, teacher)),
        "picture": density_picture(w.picture) if w else None,
        "block": w and w.block,
        "examples": [(e.student, [(text, f"{weight:.3f}") for text, weight in e.pieces]) for e in (w.examples if w else ())],
        "rows": w.rows if w else 0,
        "columns": w.columns if w else 0,
    }


def _published(run: Run) -> str:
    """Where the student lies; nothing before a training has ended."""
    spec = run.as_spec()
    return spec.output.under(spec.published_student) if run.summary else ""


def _samples(run: Run) -> list[dict[str, Any]]:
    """Prompts with everybody's continuation; a prompt that is there twice, as of a document in two corpora, counts once."""
    groups = (*SAMPLED, *((teacher_subject(teacher),) for teacher in run.teachers))
    found = [[result for who in group if (result := run.result(who)) and result.samples] for group in groups]
    prompts: dict[str, dict[str, Any]] = {}
    for result in (results[0] for results in found if results):
        for sample in result.samples:
            entry = prompts.setdefault(
                sample.prompt, {"prompt": sample.prompt, "texts": [], "reference": sample.reference.strip()}
            )
            text = (label(result.subject), color_of(run, result.subject), sample.text.strip())
            entry["texts"] += [text] if text not in entry["texts"] else []
    return list(prompts.values())
