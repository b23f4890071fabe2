"""What runs inside a teacher process: the model, and where its weights are."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from xtoken_core.compilations import keep_compilations
from xtoken_core.costs import FORWARD_TOKENS
from xtoken_core.errors import InputError
from xtoken_core.finite import largest
from xtoken_core.layers import decoder_layers, first_layers
from xtoken_core.losses import teacher_scores
from xtoken_core.losses.logits import HiddenLogits
from xtoken_core.models import final_hidden, head_logits, load_model, vocabulary_rows
from xtoken_core.processes import wait_for_end
from xtoken_core.teachers.fp8 import to_fp8
from xtoken_core.teachers.setup import Inputs, TeacherSetup
from xtoken_core.teachers.transport import Outbox, Shape, remove_traces
from xtoken_core.teachers.weights import Weights, shard


class TeacherServer:
    """A loaded teacher. Its public methods are the commands of the pipe; each returns what the reply holds."""

    def __init__(self, setup: TeacherSetup, alive: Callable[[], None]):
        """alive: gives the student a sign of life."""
        logging.disable_progress_bar()
        if setup.device.type == "cuda":
            torch.cuda.set_device(setup.device)  # what FSDP moves weights to, and where kernels are launched
        self.setup, self._alive = setup, alive
        self.model = load_model(setup.model, setup.dtype, setup.attention, setup.packed).requires_grad_(False)
        self.rows = vocabulary_rows(self.model, setup.num_ids, setup.min_rows, setup.model)
        if setup.fp8:
            to_fp8(self.model, setup.device, setup.model)
        self.outbox = Outbox(setup.device)
        shared = self._share_head() if setup.transport == "hidden" or setup.shards is not None else []
        if setup.shards is not None:
            shard(self.model, setup.shards, setup.device, whole=shared)
        self.weights = Weights(self.model, setup.device, stay=shared, movable=setup.shards is None)
        if setup.compile:
            for layer in decoder_layers(self.model):  # not the layer itself: its hooks bring its weights
                layer.forward = torch.compile(layer.forward)
        if setup.residency == "resident":
            self.settle(resident=True)

    def _share_head(self) -> list[nn.Parameter]:
        """Moves the lm_head (and the embedding tied to it) into buffers that the student maps, for good."""
        head = self.model.get_output_embeddings()
        shared = [p for p in (head.weight, getattr(head, "bias", None)) if p is not None]
        for name, parameter in zip(("head", "bias"), shared):
            (place,) = self.outbox.tensors(name, [tuple(parameter.shape)], parameter.dtype)
            parameter.data = place.copy_(parameter.data)
        return shared

    def describe(self) -> dict[str, Any]:
        """What the student needs to know: rows of the lm_head, its form, bytes of the weights that can be offloaded."""
        head = head_logits(self.model, torch.empty(0), self.rows)
        shape = tuple(self.model.get_output_embeddings().weight.shape)
        form = {"shape": shape, "bias": head.bias is not None, "scale": head.scale, "softcap": head.softcap}
        return {"rows": self.rows, "head": form, "weight_bytes": self.weights.nbytes, "handles": self.outbox.announce()}

    def onload(self) -> dict[str, Any]:
        """Brings the weights onto the device."""
        self.weights.onload()
        return {}

    def offload(self) -> dict[str, Any]:
        """Frees the device memory of weights and activations."""
        self.weights.offload()
        return {}

    def settle(self, resident: bool) -> dict[str, Any]:
        """Fixes whether the weights stay on the device from now on; if not, their host memory is pinned."""
        if resident:
            self.weights.onload()
            self.weights.forget_host()
        else:
            self.weights.pin_host()
        return {}

    @torch.no_grad()
    def warm_up(self, micro_batches: Sequence[Inputs]) -> dict[str, Any]:
        """Compiles what a run over such micro-batches takes, on the first layers: those of one kind share their code.

        That needs little of the device's memory. Where it is too much nonetheless, the run itself compiles, and tells what else is wrong.
        """
        on_device = self.weights.on_device
        with contextlib.suppress(RuntimeError), first_layers(self.model) as count:
            self.weights.onload(count)
            for _ in self._hidden(micro_batches):
                self._alive()
        if not on_device:
            self.weights.offload()
        return {}

    @torch.no_grad()
    def run(self, micro_batches: Sequence[Inputs]) -> dict[str, Any]:
        """Runs all micro-batches into the buffers: `shapes` per micro-batch, `finite`, `scores` [n][2], `working_bytes` on a GPU."""
        device, transport = self.setup.device, self.setup.transport
        width = {"hidden": self.model.config.get_text_config().hidden_size, "logits": self.rows, "topk": self.setup.top_k}[
            transport
        ]
        shapes: list[Shape] = [(*batch["input_ids"].shape, width) for batch in micro_batches]
        if transport == "topk":
            outputs = self.outbox.tensors("values", shapes, self.setup.dtype)
            indices = self.outbox.tensors("indices", shapes, torch.int32)
        else:
            outputs = self.outbox.tensors(transport, shapes, self.setup.dtype)
        scores, extremes = [], []
        for n, (inputs, hidden) in enumerate(self._hidden(micro_batches)):
            logits = head_logits(self.model, hidden, self.rows)
            if self.setup.scores is not None:
                scores.append(self._score(logits, inputs))
            if transport == "hidden":
                outputs[n].copy_(hidden)
            elif transport == "logits":
                outputs[n].copy_(logits.dense())
            else:
                values, ids = logits.dense().topk(outputs[n].shape[-1])
                outputs[n].copy_(values)
                indices[n].copy_(ids)
            extremes.append(largest([outputs[n]]))
            self._alive()
        finite = bool(torch.stack(extremes).isfinite().all())
        result = {"shapes": shapes, "finite": finite, "scores": [s.tolist() for s in scores], "handles": self.outbox.announce()}
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the student may read as soon as it has the reply
            result["working_bytes"] = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_allocated(device)
        return result

    def _hidden(self, micro_batches: Sequence[Inputs]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Of each micro-batch its tensors on the device and its final hidden states [R, L, D]; several may share a forward."""
        for group in shared_forwards(self._shapes(micro_batches), FORWARD_TOKENS):
            batches = [
                {name: torch.from_numpy(array).to(self.setup.device, non_blocking=True) for name, array in batch.items()}
                for batch in micro_batches[group]
            ]
            length = max(batch["input_ids"].shape[1] for batch in batches)
            ids = torch.cat([nn.functional.pad(b["input_ids"], (0, length - b["input_ids"].shape[1])) for b in batches])
            positions = None
            if "position_ids" in batches[0]:
                positions = torch.cat([_padded_positions(b["position_ids"], length) for b in batches])
            hidden = final_hidden(self.model, ids, positions)
            for batch, rows in zip(batches, hidden.split([len(b["input_ids"]) for b in batches])):
                yield batch, rows[:, : batch["input_ids"].shape[1]]

    def _shapes(self, micro_batches: Sequence[Inputs]) -> list[Shape]:
        """[R, L] of each micro-batch; of a teacher that is spread over ranks, which all have as many, the largest of any rank's: its processes
        gather the weights together, so that each rank has to run as many forwards."""
        shapes: list[Shape] = [batch["input_ids"].shape for batch in micro_batches]
        if self.setup.shards is None or not shapes:
            return shapes
        largest_shape = torch.tensor(shapes, device=self.setup.device).amax(0)
        dist.all_reduce(largest_shape, dist.ReduceOp.MAX)
        return [tuple(largest_shape.tolist())] * len(shapes)

    def _score(self, logits: HiddenLogits, inputs: dict[str, Tensor]) -> Tensor:
        if "gather" in inputs:
            logits = logits.over_positions(lambda tensor: tensor.flatten(0, 1)[inputs["gather"]])
        ids, mask, widths = (inputs[f"scored_{name}"] for name in ("input_ids", "token_mask", "token_bytes"))
        assert self.setup.scores is not None
        return teacher_scores(logits, ids, mask, inputs["sample_mask"], self.setup.scores, widths)


def shared_forwards(shapes: Sequence[Shape], room: int) -> Iterator[slice]:
    """Stretches of micro-batches of shapes [R, L] that one forward takes together: padded to the longest, at most `room` tokens, or one alone."""
    first = rows = longest = 0
    for n, (r, length) in enumerate(shapes):
        if n > first and (rows + r) * max(longest, length) > room:
            yield slice(first, n)
            first, rows, longest = n, 0, 0
        rows, longest = rows + r, max(longest, length)
    if shapes:
        yield slice(first, len(shapes))


def _padded_positions(positions: Tensor, length: int) -> Tensor:
    """[R, L] -> [R, length]: padding is a document of its own, as in the rows themselves."""
    more = torch.arange(length - positions.shape[1], device=positions.device)
    return torch.cat([positions, more.expand(len(positions), -1)], 1)


def exit_after(student: int) -> None:
    """Ends this process as soon as the student's, in whatever it is: a collective with the other ranks' teachers may never return."""
    wait_for_end(student)
    for process in (student, os.getpid()):
        remove_traces(process)  # the student is gone and cannot
    os._exit(0)


def teacher_main(pipe: Connection, setup: TeacherSetup, student: int, environment: dict[str, str]) -> None:
    """Serves commands until it is told to close or the student, a process id, is gone. The body of a teacher process.

    `environment`: the student's, where the server that this process is forked from may have another.
    """
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the student closes its teachers
    torch.set_num_threads(setup.threads)
    keep_compilations()
    threading.Thread(target=exit_after, args=(student,), daemon=True).start()
    try:
        server = TeacherServer(setup, alive=lambda: pipe.send(("alive", None)))
        pipe.send(("done", _stamped(time.monotonic(), server.describe())))
        while (message := pipe.recv())[0] != "close":
            command, arguments = message
            started = time.monotonic()
            pipe.send(("done", _stamped(started, getattr(server, command)(*arguments))))
    except (EOFError, BrokenPipeError):
        for process in (student, os.getpid()):
            remove_traces(process)  # the student is gone and cannot
        os._exit(0)  # torch would miss its counters
    except InputError as e:
        pipe.send(("bad input", str(e)))
    except BaseException as e:
        traceback.print_exc()
        pipe.send(("failed", f"{type(e).__name__}: {e}"))


def _stamped(started: float, result: dict[str, Any]) -> dict[str, Any]:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"started": started, "ended": time.monotonic(), "host_bytes": memory, **result}
