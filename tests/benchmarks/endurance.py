"""Long runs of tiny models: killed again and again, and watched for what grows. One JSON line; `flat` also draws its curve.

python -m tests.benchmarks.endurance kills --kills 50                  # SIGKILL at random moments of one run, each resumed
python -m tests.benchmarks.endurance flat --steps 2000 --out FILE.svg  # memory, open files and shared memory, by step
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from pipelines.warm import servers
from tests.support.training_run import changed, losses, prepare, start

SECTION = {"global_batch_size": 2, "micro_batch_size": 1, "scheduler": "cosine", "report_to": []}
GROWTH = 1.05
"""How much more the last quarter of a flat run may need than the second."""
MEASURED = {"memory_mib": "memory, MiB", "shared_mib": "shared memory, MiB", "open_files": "open files"}


def kills(count: int, steps: int, seed: int) -> dict[str, Any]:
    """Kills runs of two teachers, one with a learnable W, `count` times, each as often resumed; compares them with one that nobody disturbed.

    The moments are uniform from the start of a process on, so that they meet loading, training and the writing of checkpoints alike.
    A run that has ended is followed by another.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        values = prepare(folder, training=SECTION | {"max_steps": steps, "save_steps": 1, "eval_steps": 25})
        values["teachers"][0]["projection"] = {"learnable": True}
        for unbroken in (folder / "first", folder / "unbroken"):  # the second has a warm server to start from
            begun = time.monotonic()
            started = start(values, folder, unbroken)
            while not (unbroken / "log.jsonl").exists():
                time.sleep(0.005)
            setup = time.monotonic() - begun
            started.finish()
        moments: list[dict[str, Any]] = []
        outs = [folder / "broken-0"]
        while len(moments) < count:
            moment = _kill(values, folder, outs[-1], chance.uniform(0, setup + 2))
            if moment is None:
                outs.append(folder / f"broken-{len(outs)}")
            else:
                moments.append(moment)
        start(values, folder, outs[-1]).finish()
        return {
            "case": "kills",
            "kills": count,
            "steps": steps,
            "runs": len(outs),
            "met": Counter(moment["met"] for moment in moments),
            "weights_equal": all(_same(folder / "unbroken", out) for out in outs),
            "losses_equal": all(losses(folder / "unbroken") == losses(out) for out in outs),
            "processes_left": len(set(psutil.Process().children(recursive=True)) - set(servers())),
            "moments": moments,
        }


def _same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same student and the same W, bit for bit."""
    pairs = [
        [load_file(out / "last" / name) for out in (one, other)] for name in ("model.safetensors", "projection-other.safetensors")
    ]
    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)


def _kill(values: dict[str, Any], folder: Path, out: Path, after: float) -> dict[str, Any] | None:
    """Starts the run and kills it after some seconds: when, after which step, and what it was doing; None if it had ended by then."""
    before = len(_log(out))
    started = start(values, folder, out)
    time.sleep(after)
    if not started.process.is_alive():
        started.finish()
        return None
    started.process.kill()
    started.process.join()
    printed = started.output.read()
    resumed = re.search(r"resumes at step (\d+)", printed)
    unfinished = [c for c in (out / "checkpoints").glob("checkpoint-*") if not (c / "checksums.json").exists()]
    met = "the writing of a checkpoint" if unfinished else "training" if len(_log(out)) > before else "loading"
    return {
        "run": out.name,
        "seconds": round(after, 3),
        "resumed_at": int(resumed[1]) if resumed else None,
        "last_step": max((step for step, *_ in losses(out)), default=0) if _log(out) else 0,
        "met": met,
    }


def _log(out: Path) -> bytes:
    path = out / "log.jsonl"
    return path.read_bytes() if path.exists() else b""


def flat(steps: int) -> dict[str, Any]:
    """Watches a run of two teachers from outside, twice a second."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        training = SECTION | {"max_steps": steps, "save_steps": max(1, steps // 40), "eval_steps": max(1, steps // 40)}
        values = changed(prepare(folder), training=training)
        out, curve = folder / "out", []
        started = start(values, folder, out)
        while started.process.is_alive():
            time.sleep(0.5)
            step = _log(out).count(b'"loss"')
            with contextlib.suppress(psutil.NoSuchProcess):
                sample = _sample()
                if 0 < step < steps:  # neither loading nor ending
                    curve.append({"step": step} | sample)
        started.finish()
    quarter = len(curve) // 4
    second, last = curve[quarter : 2 * quarter], curve[-quarter:]
    growth = {
        name: round(statistics.fmean(s[name] for s in last) / max(statistics.fmean(s[name] for s in second), 1e-9), 4)
        for name in MEASURED
    }
    return {"case": "flat", "steps": steps, "growth": growth, "flat": max(growth.values()) <= GROWTH, "curve": curve}


def _sample() -> dict[str, float]:
    """What student, teachers and their servers hold together: memory (each page once), of it shared, and open files."""
    family = psutil.Process().children(recursive=True)
    shared = [re.search(r"RssShmem:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()) for process in family]
    return {
        "memory_mib": round(sum(process.memory_full_info().pss for process in family) / 2**20, 1),
        "shared_mib": round(sum(int(found[1]) for found in shared if found) / 2**10, 2),
        "open_files": sum(process.num_fds() for process in family),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the curve of a flat run."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(len(MEASURED), sharex=True), MEASURED.items()):
        axes.plot([s["step"] for s in result["curve"]], [s[name] for s in result["curve"]], linewidth=1)
        axes.set(ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.set(xlabel="optimizer step")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["kills", "flat"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, help="default: 200 of a run that is killed, 2000 of one that is watched")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, help="picture of a flat run's curve")
    options = parser.parse_args()
    if options.case == "kills":
        result = kills(options.kills, options.steps or 200, options.seed)
    else:
        result = flat(options.steps or 2000)
        if options.out:
            draw(result, options.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
