"""The files of a run that never was, in the shapes of real ones, for tests of the report.

`python -m tests.support.report_sample FOLDER` writes its report and a comparison there, to look at.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

from xtoken_core.report.compare import write_comparison
from xtoken_core.report.page import write_report
from xtoken_core.report.run import Run
from xtoken_core.spec import DistillationSpec

SPEC = """
name: smollm2-from-gemma-and-smollm2
student: {model: models/SmolLM2-135M-Instruct, keep_layers: [0, 1, 2, 3, 4, 5, 24, 25, 26, 27, 28, 29]}
teachers:
  - {id: gemma, model: models/gemma-3-270m, projection: {}}
  - {id: smollm, model: models/SmolLM2-135M-Instruct}
loss: {mode: p_kl, weight_metric: ce}
data: {train: [texts/train], validation: [texts/validation], max_length: 256}
training: {max_steps: 120, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-3, warmup_steps: 10, eval_steps: 10}
evaluation: {ce_baseline: true, texts: [texts/kjv, texts/carroll]}
output: {uri: runs/demo}
"""

LEVELS = {
    "student_before": 3.221,
    "student_after_best": 1.842,
    "student_after_last": 1.851,
    "baseline_best": 2.402,
    "baseline_last": 2.931,
    "teacher-gemma": 1.062,
    "teacher-smollm": 1.124,
}

PROMPTS = [
    (
        "And it came to pass in those days, that",
        " there went out a decree from Caesar Augustus, that all the world should be taxed.",
    ),
    ("Alice was beginning to get very tired of", " sitting by her sister on the bank, and of having nothing to do."),
    ('The second law <of> "thermodynamics" & its\nlimits:', " entropy does not decrease."),
]


def write_files(folder: Path, *, seed: int = 0, shift: float = 0.0, steps: int = 120) -> dict:
    """Writes every file of a run; returns the arguments of `Run.collect`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def put(name: str, value: object) -> Path:
        (folder / name).write_text(json.dumps(value))
        return folder / name

    spec = DistillationSpec.from_text(SPEC, [f"training.max_steps={steps}", f"training.seed={seed}"])
    results = [put(f"{who}.json", _result(who, level + shift, np.random.default_rng(99))) for who, level in LEVELS.items()]
    return {
        "spec": spec.to_json(),
        "log": _log(folder / "log.jsonl", rng, steps, twin=False),
        "baseline_log": _log(folder / "baseline.jsonl", rng, steps, twin=True),
        "summary": put("summary.json", _summary(steps)),
        "results": results,
        "overlap": put("overlap.json", _overlap()),
        "projections": {"gemma": put("projection.json", _projection(rng))},
        "prepare": {split: _prepare(split) for split in ("train", "validation")},
        "inputs": _inputs(),
        "tasks": _tasks(),
    }


def sample_run(folder: Path, **options: float) -> Run:
    """The run as the report component collects it."""
    return Run.collect(**write_files(folder, **options))


def _log(path: Path, rng: np.random.Generator, steps: int, twin: bool) -> Path:
    lines = []
    for step in range(steps + 1):
        done, noise = step / steps, rng.normal(0, 0.05, 8)
        if step:
            ce = 2.6 * math.exp(-(9 if twin else 4) * done) + (0.3 if twin else 1.9) + noise[0] * 3
            kd = {
                "kd_gemma": 0.9 * math.exp(-5 * done) + 0.2 + noise[1] / 3,
                "kd_smollm": 60 * math.exp(-6 * done) + 0.7 + abs(noise[2]),
            }
            line = {
                "step": step,
                "ce": ce,
                "loss": ce if twin else 2 * ce,
                "accuracy": 0.62 - 0.4 * math.exp(-4 * done) + noise[3] / 5,
            }
            line |= {
                "learning_rate": 1e-3 * min(1, step / 10) * (0.5 + 0.5 * math.cos(math.pi * done)),
                "grad_norm": 0.6 + 3 * math.exp(-8 * done) + abs(noise[4]),
            }
            line |= {
                "tokens": step * 1000,
                "tokens_per_second": 700 + 400 * noise[5],
                "seconds_step": 1.4 + noise[6],
                "memory_gib": (1.9 if twin else 3.1) + min(1, 5 * done) * 0.8,
            }
            if not twin:
                line |= kd | {
                    "kd": sum(kd.values()),
                    "scale": ce / sum(kd.values()),
                    "weight_gemma": 0.6 + noise[1],
                    "weight_smollm": 0.4 - noise[1],
                }
                line |= {
                    "seconds_gemma": 0.5 + noise[7] / 4,
                    "seconds_smollm": 0.25 + noise[7] / 8,
                    "seconds_teachers": 0.75 + noise[7] / 3,
                }
                line |= {"selected": "gemma" if noise[1] > 0 else "smollm"}
            lines.append(line)
        if step % 10 == 0:
            bits = 1.85 + 1.37 * math.exp(-6 * done) if not twin else 2.3 + 0.9 * math.exp(-14 * done) + 0.6 * done**1.5
            lines.append({"step": step, "validation_bits_per_byte": bits})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _result(who: str, level: float, rng: np.random.Generator) -> dict:
    size = rng.integers(400, 4000, 24)
    bits = size * (level + rng.normal(0, 0.15, 24)) + np.random.default_rng(len(who)).normal(0, 20, 24)
    corpora = ["texts/kjv"] * 12 + ["texts/carroll"] * 12
    total = bits.sum() / size.sum()
    halves = {name: slice(12 * i, 12 * i + 12) for i, name in enumerate(("texts/kjv", "texts/carroll"))}
    per_corpus = {
        name: {
            "total": (t := bits[part].sum() / size[part].sum()),
            "low": t - 0.08,
            "high": t + 0.08,
            "documents": 12,
            "bytes": int(size[part].sum()),
        }
        for name, part in halves.items()
    }
    student = not who.startswith("teacher")
    tasks = {
        "arc_easy": {
            "metric": "acc",
            "value": 0.61 - 0.09 * level,
            "samples": 1000,
            "shots": 0,
            "higher_is_better": True,
        },
        "winogrande": {
            "metric": "acc",
            "value": 0.53 - 0.01 * level,
            "samples": 1267,
            "shots": 3,
            "higher_is_better": True,
        },
    }
    tasks["mmlu"] = tasks["arc_easy"] | {"shots": 3, "samples": 14042, "parts": {}}
    for part, samples in {"mmlu_stem": 3153, "mmlu_humanities": 4705}.items():
        tasks["mmlu"]["parts"][part] = tasks["winogrande"] | {"samples": samples, "low": 0.3, "high": 0.6}
    return {
        "who": who,
        "model": who,
        "bits_per_byte": {
            "total": total,
            "low": total - 0.05,
            "high": total + 0.05,
            "per_corpus": per_corpus,
            "documents": {"corpus": corpora, "bits": bits.tolist(), "bytes": size.tolist()},
        },
        "tasks": {name: entry | {"low": entry["value"] - 0.03, "high": entry["value"] + 0.03} for name, entry in tasks.items()},
        "agreement": {t: {"top1": 0.75 - level / 8, "kl": level / 3, "chunks": 5000} for t in ("gemma", "smollm")} if student else {},
        "tokens_per_second": 2100 + 300 * len(who),
        "samples": [{"prompt": p, "text": f" the {'king' if level < 2 else 'the the'} said unto the people of <{who}>.", "reference": r} for p, r in PROMPTS] if student else [],
    }  # fmt: skip


def _summary(steps: int) -> dict:
    environment = {
        "python": "3.11.7",
        "platform": "Linux-6.1-x86_64-with-glibc2.36",
        "versions": {"xtoken-pipelines": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "kfp": "2.17.0"},
        "commit": "1a3e1f5",
        "cpu": "AMD EPYC",
        "cpu_cores": 2,
        "memory_gib": 23.5,
        "devices": [],
    }
    phases = {"gemma": 61.0, "smollm": 30.0, "student": 96.0, "validation": 21.0, "checkpoint": 6.0}
    summary = {"steps": steps, "tokens": steps * 1000, "seconds": 214.0, "best_step": steps - 10, "modes": {"gemma": "p_kl"}}
    return {**summary, "parameters": 74_400_000, "seconds_by_phase": phases, "environment": environment}


def _overlap() -> dict:
    def coverage(digits: float) -> dict:
        shares = {
            "letter": 0.83,
            "digit": digits,
            "punctuation": 0.97,
            "whitespace": 0.91,
            "single_character": 0.99,
            "other": 0.42,
        }
        return {
            name: {"tokens": 1000 * (i + 1), "covered": int(1000 * (i + 1) * s), "share": s}
            for i, (name, s) in enumerate(shares.items())
        }

    reason = "no two- or three-digit tokens on the student's side"
    gemma = {
        "fingerprint": "9f0b2c4417aa",
        "size": 262144,
        "same_vocabulary": False,
        "shared": 34000,
        "coefficient": 0.6912,
        "mode": "p_kl",
    }
    same = {
        "fingerprint": "5a7c01d2e9ff",
        "size": 49152,
        "same_vocabulary": True,
        "shared": 49152,
        "coefficient": 1.0,
        "mode": "same_vocabulary",
    }
    return {
        "student": {"fingerprint": "5a7c01d2e9ff", "size": 49152},
        "teachers": {"gemma": gemma | {"coverage": coverage(1.0), "reason": reason}, "smollm": same | {"coverage": {}}},
        "matrix": {
            "names": ["student", "gemma", "smollm"],
            "coefficient": [[1.0, 0.691, 1.0], [0.691, 1.0, 0.691], [1.0, 0.691, 1.0]],
        },
    }


def _projection(rng: np.random.Generator) -> dict:
    picture = rng.gamma(0.3, 2.0, (48, 64)) * (rng.random((48, 64)) < 0.6)
    picture[np.arange(48), np.arange(48) * 64 // 48] += 300
    examples = [
        {"student": " thermodynamics", "pieces": [[" therm", 0.9], ["odynamics", 0.1]]},
        {"student": "\n\n\n", "pieces": [["\n", 1.0]]},
    ]
    tokens = ["2024", " the", " tokenizer", "():\\n", "naïve"]
    pieces = ["2", "0", "4", "␣the", "␣token", "izer", "():", "\\n", "na", "ïve"]
    weights = [[0.9, 0.099, 0.001, *[0] * 7], [0, 0, 0, 1, *[0] * 6], [0, 0, 0, 0, 0.909, 0.091, 0, 0, 0, 0]]
    weights += [[0] * 6 + [0.909, 0.091, 0, 0], [0] * 8 + [0.909, 0.091]]
    block = {"rows": tokens, "columns": pieces, "weights": weights}
    counts = {"0": 12, "1": 34012, "2": 11000, "3": 3500, "4": 628}
    numbers = {"rows": 49152, "columns": 262144, "entries": 70000, "exact": 33980, "multi": 15128, "empty": 12, "seconds": 3.2}
    return {**numbers, "entries_per_row": counts, "picture": picture.round(3).tolist(), "block": block, "examples": examples}


def _prepare(split: str) -> dict:
    size = 61_000 if split == "train" else 24_000
    corpora = {f"texts/{split}": {"documents": 41, "bytes": size}}
    teachers = {"gemma": {"tokens": size // 4, "chunks": size // 5, "exact_chunks": int(size / 5 * 0.999)}}
    numbers = {
        "documents": 41,
        "rows": 16 * size // 61_000,
        "bytes": size,
        "student_tokens": size // 4,
        "dropped_documents": {},
        "seconds": 2.1,
    }
    return {**numbers, "corpora": corpora, "teachers": teachers}


def _inputs() -> list[dict]:
    models = {"student.model": "models/SmolLM2-135M-Instruct", "teachers.gemma.model": "models/gemma-3-270m"}
    read = models | {"data.train": "texts/train", "data.validation": "texts/validation"}
    return [{"field": name, "uri": uri, "version": "c0ffee12deadbeef"} for name, uri in read.items()]


def _tasks() -> list[dict]:
    evaluations = [
        "student-before",
        "student-after-best",
        "student-after-last",
        "baseline-best",
        "baseline-last",
        "teacher-gemma",
        "teacher-smollm",
    ]
    needs = {
        "student-before": "resolve",
        "student-after-best": "distill",
        "student-after-last": "distill",
        "baseline-best": "distill-baseline",
    }
    needs |= {"baseline-last": "distill-baseline", "teacher-gemma": "resolve", "teacher-smollm": "resolve"}
    tasks = [
        {"name": "resolve", "after": [], "seconds": 1.3},
        {"name": "overlap", "after": ["resolve"], "seconds": 4.8, "status": "cached"},
        {"name": "projection-gemma", "after": ["resolve", "overlap"], "seconds": 5.9, "status": "cached"},
        {"name": "prepare", "after": ["resolve", "overlap"], "seconds": 8.1},
        {"name": "distill", "after": ["resolve", "prepare", "projection-gemma", "overlap"], "seconds": 214.0},
        {"name": "distill-baseline", "after": ["resolve", "prepare"], "seconds": 131.0},
        *(
            {"name": f"evaluate-{who}", "after": ["resolve", needs[who]], "seconds": 9.0 + 3 * i}
            for i, who in enumerate(evaluations)
        ),
    ]
    return [
        *tasks,
        {
            "name": "report",
            "after": [f"evaluate-{who}" for who in evaluations] + ["distill"],
            "seconds": None,
            "status": "running",
        },
    ]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    one = sample_run(out / "one")
    print(write_report(one, out / "one"))
    print(write_comparison([one, sample_run(out / "two", seed=1, shift=0.07, steps=900)], out / "compare.html"))
