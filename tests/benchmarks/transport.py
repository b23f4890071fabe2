"""What handing a teacher's output over costs: `python -m tests.benchmarks.transport --device cuda|cpu [--steps 5]`.

A process fills a buffer with a step's output and another process reads every byte of it, as the student does. `shared`: persistent buffers,
as training uses them (CUDA IPC on a GPU, shared memory on a CPU). `pipe`: the same bytes through the host and a pipe. Both in one
run. `seconds` is what passes between the teacher's last write and the moment the student can begin to read. One JSON line per payload, last
line a summary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp

from xtoken_core.teachers.transport import Inbox, Outbox, Shape, remove_traces


@dataclass(frozen=True)
class Payload:
    """A step's output of one teacher on one rank."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def nbytes(self) -> int:
        """In bf16."""
        return sum(2 * b * t * width for b, t, width in self.shapes)


def payloads(rows: int, length: int) -> list[Payload]:
    """Hidden states, top-k values and, of one row in 16 only, full logits in the sizes of Qwen3-4B."""
    row = (1, length)
    return [
        Payload("hidden", ((*row, 2560),) * rows),
        Payload("topk_1024", ((*row, 1024),) * rows),
        Payload("logits", ((*row, 151936),) * max(rows // 16, 1)),
    ]


def produce(pipe: Connection, payload: Payload, device: torch.device, shared: bool) -> None:
    """The teacher's end: on every request writes, notes the time, and hands over."""
    outbox = Outbox(device)
    while pipe.recv():
        tensors = outbox.tensors("output", payload.shapes, torch.bfloat16)
        for n, tensor in enumerate(tensors):
            tensor.fill_(n + 1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        written = time.monotonic()
        if shared:
            pipe.send((written, outbox.announce()))
        else:
            pipe.send((written, [tensor.cpu().view(torch.int16).numpy() for tensor in tensors]))


def seconds_to_hand_over(payload: Payload, device: torch.device, shared: bool, steps: int) -> float:
    """Median over the steps after the first, in which the buffer is mapped."""
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=produce, args=(theirs, payload, device, shared), daemon=True)
    process.start()
    inbox, seconds = Inbox(), []
    for _ in range(steps + 1):
        pipe.send(True)
        written, content = pipe.recv()
        if shared:
            inbox.receive(content)
            tensors = inbox.tensors("output", payload.shapes, torch.bfloat16)
        else:
            tensors = [torch.from_numpy(array).view(torch.bfloat16).to(device) for array in content]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - written)
        assert [int(t[0, -1, -1]) for t in tensors] == [int(torch.tensor(n + 1).bfloat16()) for n in range(len(tensors))]
        del tensors
    pipe.send(False)
    inbox.close()
    process.join()
    remove_traces(process.pid)
    return statistics.median(seconds[1:])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    results = []
    for payload in payloads(*(32, 2048) if options.device == "cuda" else (8, 128)):
        shared, piped = (seconds_to_hand_over(payload, device, way, options.steps) for way in (True, False))
        results.append({
            "case": payload.name, "mib": round(payload.nbytes / 2**20, 1), "shared_ms": round(shared * 1e3, 3),
            "pipe_ms": round(piped * 1e3, 3), "ratio": round(piped / shared, 1),
        })  # fmt: skip
        print(json.dumps(results[-1]), flush=True)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({
        "summary": "transport", "device": device_name, "torch": torch.__version__, "worst_shared_ms": max(r["shared_ms"] for r in results),
        "smallest_ratio": min(r["ratio"] for r in results),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
