"""The lab's workers: one a device, each in a process of its own, over one plan."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import time
import traceback
from pathlib import Path

import psutil
import torch

from tests.benchmarks.quality.arms import Job, Plan
from tests.benchmarks.quality.teachers import claim
from tests.benchmarks.quality.train import Bench, train


def worker(plan_file: Path, out: Path, device_name: str, workers: int, deadline: float) -> None:
    """Takes the plan's jobs in order, those that need nothing loaded first, until none is left or time is up.

    workers: how many share the device, which says how much a line's speed is worth.

    The plan is read anew before every job: it may grow meanwhile. A job whose teacher is not there yet (it may still be on its way)
    is left for later.
    """
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    bench: Bench | None = None
    result = out / f"{device_name.replace(':', '')}-{os.getpid()}.jsonl"
    while time.time() < deadline:
        plan = Plan.load(plan_file)
        job = _next(plan, out, bench)
        if job is None:
            if all(plan.ready(job) for job in plan.jobs):
                return
            time.sleep(1)
            continue
        try:
            setting = plan.setting(job.setting)
            if bench is None or not bench.serves(setting):
                bench = None
                torch.compiler.reset()  # what was compiled holds the weights of the setting before
                gc.collect()
                torch.cuda.empty_cache()
                bench = Bench.open(setting, device, out)
            line = train(bench, setting, job) | {"workers": workers}
        except Exception:
            line = {"key": job.key, "failed": traceback.format_exc(limit=-6)}
        with result.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _next(plan: Plan, out: Path, bench: Bench | None) -> Job | None:
    """The first job that nobody has claimed."""
    ready = [job for job in plan.jobs if plan.ready(job)]
    own = [job for job in ready if bench is not None and bench.serves(plan.setting(job.setting))]
    others = [job for job in ready if job not in own]
    return next((job for job in own + others if claim(out / f"{job.key}.claim")), None)


def run(plan: Path, out: Path, devices: list[str], seconds: float) -> None:
    """Starts a worker for each name of a device and waits for all. Work that was claimed by a process that has ended is given back first."""
    out.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["key"] for file in out.glob("*.jsonl") for line in file.read_text().splitlines()}
    for path in out.rglob("*.claim"):
        finished = path.stem in done or path.with_suffix(".done").exists()
        if not finished and not psutil.pid_exists(int(path.read_text() or 0)):
            path.unlink()
    deadline = time.time() + seconds
    if len(devices) == 1:
        worker(plan, out, devices[0], 1, deadline)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(plan, out, name, devices.count(name), deadline)) for name in devices]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
