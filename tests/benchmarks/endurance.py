"""Long runs of tiny models: killed again and again, and watched for what grows. One JSON line, and with --out the curve as a file.

python -m tests.benchmarks.endurance kills --kills 50     # SIGKILL at random moments of one run, each resumed; weights as of an unbroken run
python -m tests.benchmarks.endurance flat --steps 2000    # memory, open files and shared memory of student and teacher, by step
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.support.training_run import changed, losses, prepare, start

SECTION = {"global_batch_size": 2, "micro_batch_size": 1, "scheduler": "cosine", "report_to": []}
GROWTH = 1.05
"""How much more the last quarter of a flat run may need than the second."""


def kills(count: int, steps: int, seed: int) -> dict[str, Any]:
    """Kills a run `count` times, as often resumed, and compares it with one that nobody disturbed."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        values = prepare(folder, teachers=1, training=SECTION | {"max_steps": steps, "save_steps": 1, "eval_steps": 25})
        values["teachers"][0]["projection"] = {"learnable": True}
        unbroken, broken = folder / "unbroken", folder / "broken"
        start(values, folder, unbroken).finish()
        moments = [_kill(values, folder, broken, chance) for _ in range(count)]
        start(values, folder, broken).finish()
        weights = [load_file(out / "last" / "model.safetensors") for out in (unbroken, broken)]
        learned = [load_file(out / "last" / "projection-other.safetensors") for out in (unbroken, broken)]
        equal = all(torch.equal(a[n], b[n]) for a, b in (weights, learned) for n in a)
        return {
            "case": "kills",
            "kills": count,
            "steps": steps,
            "killed_at_steps": moments,
            "weights_equal": equal,
            "losses_equal": losses(unbroken) == losses(broken),
        }


def _kill(values: dict[str, Any], folder: Path, out: Path, chance: random.Random) -> int:
    """Starts the run and kills it at a random moment from its first new line on; the last step that its log tells."""
    log = out / "log.jsonl"
    before = _size(log)
    started = start(values, folder, out)
    while started.process.is_alive() and _size(log) <= before:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 1.0))
    if not started.process.is_alive():
        raise RuntimeError(f"the run ended before it was killed; give it more steps: {started.finish()[-1000:]}")
    started.process.kill()
    started.process.join()
    return max((step for step, *_ in losses(out)), default=0)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def flat(steps: int) -> dict[str, Any]:
    """Watches a run of one teacher from outside, twice a second."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        training = SECTION | {"max_steps": steps, "save_steps": max(1, steps // 10), "eval_steps": max(1, steps // 10)}
        values = changed(prepare(folder, teachers=1), training=training)
        out, curve = folder / "out", []
        started = start(values, folder, out)
        while started.process.is_alive():
            time.sleep(0.5)
            if sample := _sample(out / "log.jsonl"):
                curve.append(sample)
        started.finish()
    half = len(curve) // 4
    second, last = curve[half : 2 * half], curve[-half:]
    growth = {
        name: round(statistics.fmean(s[name] for s in last) / max(statistics.fmean(s[name] for s in second), 1e-9), 4)
        for name in ("memory_mib", "open_files", "shared_mib")
    }
    return {"case": "flat", "steps": steps, "growth": growth, "flat": max(growth.values()) <= GROWTH, "curve": curve}


def _sample(log: Path) -> dict[str, float] | None:
    """What student, teacher and their server hold together: private and shared memory (each page once), open files, /dev/shm."""
    try:
        family = psutil.Process().children(recursive=True)
        step = log.read_bytes().count(b'"loss"') if log.exists() else 0
        if step == 0:
            return None
        memory = sum(process.memory_full_info().pss for process in family) / 2**20
        files = sum(process.num_fds() for process in family)
    except psutil.NoSuchProcess:
        return None
    shared = psutil.disk_usage("/dev/shm").used / 2**20
    return {"step": step, "memory_mib": round(memory, 1), "open_files": files, "shared_mib": round(shared, 2)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["kills", "flat"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, help="default: 8 a kill, or 2000")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, help="file for the whole result, the curve with it")
    options = parser.parse_args()
    if options.case == "kills":
        result = kills(options.kills, options.steps or 20 + 15 * options.kills, options.seed)
    else:
        result = flat(options.steps or 2000)
    if options.out:
        options.out.write_text(json.dumps(result, indent=None) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name not in ("curve", "killed_at_steps")}))


if __name__ == "__main__":
    main()
