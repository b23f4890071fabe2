"""Memory of a run's evaluations beside what is planned: `python -m tests.benchmarks.evaluations SPEC [--set KEY=VALUE]`.

Each kind runs as the step does, in a memory control group of its own (cgroup v1, as root), which counts what Kubernetes counts: anonymous
memory, shared memory, and files in the page cache, which are dropped when the limit is near. It runs again under the planned limit. One
JSON line a kind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from xtoken_core.costs import GIB
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.evaluations import evaluate_group
from xtoken_core.workflow.plan import plan
from xtoken_core.workflow.subjects import Group
from xtoken_core.workflow.vocabularies import matrices, write_projections

CGROUPS = Path("/sys/fs/cgroup/memory")
KINDS = {"teacher": Group.TEACHERS, "student": Group.BEFORE}
"""Those that a plan tells, by a group of each; a trained student takes what the untrained one does."""


def evaluated(spec: DistillationSpec, group: Group, folder: Path) -> None:
    """What the step does."""
    found = matrices(spec, str(folder / "w"))
    modes = {teacher.id: "p_kl" for teacher in spec.teachers if teacher.cross_tokenizer}
    evaluate_group(spec, group, folder / str(group), None, folder / "rows", found, modes)


def within(group: Path, limit: int | None, work: Callable[..., None], *given: object) -> dict[str, float | int]:
    """Runs the work in a process within a control group of memory; its peaks in GiB, and the process's exit code (-9: killed)."""
    group.mkdir()
    if limit:
        (group / "memory.limit_in_bytes").write_text(str(limit))
    process = multiprocessing.get_context("spawn").Process(target=_entered, args=(group, work, *given))
    peak, done = [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(group, peak, done))
    process.start()
    watch.start()
    process.join()
    done.set()
    watch.join()
    usage = int((group / "memory.max_usage_in_bytes").read_text())
    group.rmdir()
    code = process.exitcode
    assert code is not None
    return {"peak_gib": round(peak[0] / GIB, 2), "with_files_gib": round(usage / GIB, 2), "exit": code}


def _entered(group: Path, work: Callable[..., None], *given: object) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    work(*given)


def _watch(group: Path, peak: list[int], done: threading.Event) -> None:
    """Keeps the largest anonymous and shared memory of the group, looked at fifty times a second."""
    while not done.is_set():
        found = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        peak[0] = max(peak[0], int(found["rss"]) + int(found["shmem"]))
        time.sleep(0.02)


def main() -> None:
    """Prints a line for each kind of evaluation, without a limit and under the planned one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    spec = DistillationSpec.from_yaml(options.spec, options.set)
    planned = plan(spec).host_memory
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare_rows(spec, folder / "rows" / "validation", "validation")
        write_projections(spec, folder / "w")
        for kind, group in KINDS.items():
            line: dict[str, object] = {"kind": kind, "planned_gib": round(planned[kind] / GIB, 2)}
            for name, limit in (("free", None), ("limited", planned[kind])):
                cgroup = CGROUPS / f"xtoken-{os.getpid()}-{kind}-{name}"
                line[name] = within(cgroup, limit, evaluated, spec, group, folder)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
