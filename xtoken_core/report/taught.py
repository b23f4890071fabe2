"""Who taught what: the report's table of teachers that teach some domains of the data."""

from __future__ import annotations

from xtoken_core.data.documents import domain_of_corpus
from xtoken_core.report.run import Run
from xtoken_core.report.tables import MISSING, Cell, Table, bits_cell
from xtoken_core.results.evaluation import Evaluation
from xtoken_core.results.subject import BEFORE


def taught_table(run: Run) -> Table | None:
    """Who taught what, where a teacher teaches some domains only: rows, chunks, KD, and the student's bits per byte on each domain's text."""
    if not any(teacher.get("domains") for teacher in run.spec["teachers"]):
        return None
    train = run.prepare.get("train")
    counts = train.domains if train else {}
    lines = [line.teachers for line in run.log if line.of_training]
    a_line = run.summary.steps / len(lines) if run.summary and lines else 1.0  # steps that a logged one stands for
    rows = []
    for teacher in (t for t in run.spec["teachers"] if t["id"] in run.heard):
        name, domains = teacher["id"], teacher.get("domains")
        told = [line[name] for line in lines if name in line]
        taught = sum(counts.get(domain, 0) for domain in domains) if domains else train.rows if train else 0
        chunks, seconds = [line.chunks for line in told if line.chunks is not None], sum(line.seconds or 0 for line in told)
        kd = [line.kd for line in told if line.kd is not None and (line.chunks is None or line.chunks > 0)]
        rows.append(
            [
                Cell(name),
                Cell(", ".join(domains) if domains else "all"),
                Cell(f"{taught:,}", taught, note=f"of {train.rows:,}" if train else ""),
                Cell(f"{a_line * sum(chunks):,.0f}", a_line * sum(chunks)) if chunks else MISSING,
                *(Cell(f"{value:.3f}", value) if kd else MISSING for value in (kd[:1] + kd[-1:] or (0.0, 0.0))),
                Cell(f"{a_line * seconds:,.1f}", a_line * seconds),
                *(_bits_of_domains(result, domains) for result in (run.result(BEFORE), run.after)),
            ]
        )
    columns = ["teacher", "domains", "rows", "chunks", "first KD", "last KD", "seconds", "student before", "student after"]
    caption = (
        "Who taught what: prepared rows of each teacher's domains; chunks and seconds of its forward passes over the training, where not every "
        "step is logged by those that are; KD of the first and the last step in which it taught. Student: its bits per byte on held-out text that goes by a domain's name (`evaluation.texts`: .../code.jsonl)."
    )
    return Table(columns, rows, caption)


def _bits_of_domains(result: Evaluation | None, domains: list[str] | None) -> Cell:
    """A student's bits per byte on the corpora that are named as domains are; of none, on all text."""
    measured = result.bits_per_byte if result else None
    if measured is None or not domains:
        return bits_cell(measured)
    found = {domain_of_corpus(name): bits for name, bits in measured.per_corpus.items()}
    of = {domain: found[domain] for domain in domains if domain in found}
    if not of:
        return MISSING
    size = sum(bits.bytes for bits in of.values())
    mean = sum((bits.total or 0.0) * bits.bytes for bits in of.values()) / max(size, 1)
    return Cell(f"{mean:.3f}", mean, note=", ".join(of))
