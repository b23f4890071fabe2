"""Does distillation make a better student, at equal tokens and at equal time? `python -m tests.benchmarks.quality prepare|train|report`

    prepare STUDENT TEACHER... --text FOLDER --out FOLDER
        rows of a student under teachers of other vocabularies, and W with the cells of each pair
    train PLAN --out FOLDER [--devices cuda:0,cuda:1,... | cpu] [--seconds N]
        works through the arms of a plan (`arms.Plan` as JSON), one worker a device; what has a result already is left out
    report FOLDER --out FILE
        one table (FILE.md) and one picture (FILE.svg) from the JSON lines in FOLDER

Models are folders or .gguf files. Every arm of a table starts from the same weights and sees rows in the same order with the same learning
rate; the teachers' final hidden states over the training rows are computed once and shared by all arms.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import traceback
from pathlib import Path

import torch

from tests.benchmarks.quality.arms import Job, Plan
from tests.benchmarks.quality.prepare import prepare_folder
from tests.benchmarks.quality.report import write_report
from tests.benchmarks.quality.teachers import claim
from tests.benchmarks.quality.train import Bench, train


def worker(plan_file: Path, out: Path, device_name: str, deadline: float) -> None:
    """Takes the plan's jobs in order, those of the setting at hand first, until none is left or time is up.

    The plan is read anew before every job: it may grow meanwhile. A job whose teacher is not there yet (it may still be on its way)
    is left for later.
    """
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    bench: Bench | None = None
    result = out / f"{device_name.replace(':', '')}.jsonl"
    while time.time() < deadline:
        plan = Plan.load(plan_file)
        job = _next(plan, out, bench)
        if job is None:
            if all(plan.ready(job) for job in plan.jobs):
                return
            time.sleep(1)
            continue
        try:
            if bench is None or bench.setting != plan.setting(job.setting):
                bench = None
                bench = Bench.open(plan.setting(job.setting), device, out)
            line = train(bench, job)
        except Exception:
            line = {"key": job.key, "failed": traceback.format_exc(limit=-6)}
        with result.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _next(plan: Plan, out: Path, bench: Bench | None) -> Job | None:
    """The first job that nobody has claimed."""
    ready = [job for job in plan.jobs if plan.ready(job)]
    own = [job for job in ready if bench is not None and job.setting == bench.setting.name]
    others = [job for job in ready if job not in own]
    return next((job for job in own + others if claim(out / f"{job.key}.claim")), None)


def run(plan: Path, out: Path, devices: list[str], seconds: float) -> None:
    """Starts a worker a device and waits for all. Claims of jobs without a result, of a run that was cut off, are given back first."""
    out.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["key"] for file in out.glob("*.jsonl") for line in file.read_text().splitlines()}
    for path in out.glob("*.claim"):
        if path.stem not in done:
            path.unlink()
    deadline = time.time() + seconds
    if len(devices) == 1:
        worker(plan, out, devices[0], deadline)
        return
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(plan, out, device, deadline)) for device in devices]
    for process in workers:
        process.start()
    for process in workers:
        process.join()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare")
    prepare.add_argument("student")
    prepare.add_argument("teachers", nargs="+")
    prepare.add_argument("--text", type=Path, required=True)
    prepare.add_argument("--max-length", type=int, default=512)
    train_ = commands.add_parser("train")
    train_.add_argument("plan", type=Path)
    train_.add_argument("--devices", default=",".join(f"cuda:{n}" for n in range(torch.cuda.device_count())) or "cpu")
    train_.add_argument("--seconds", type=float, default=1e9)
    report = commands.add_parser("report")
    report.add_argument("folder", type=Path)
    for command in (prepare, train_, report):
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "prepare":
        prepare_folder(options.student, options.teachers, options.text, options.out, options.max_length)
    elif options.command == "train":
        run(options.plan, options.out, options.devices.split(","), options.seconds)
    else:
        write_report(options.folder, options.out)


if __name__ == "__main__":
    main()
