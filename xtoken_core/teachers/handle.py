"""A teacher in a process of its own: the process, and the student's handle of it.

The two talk over a pipe in strict turns: the student sends a command, the teacher does it and replies. Outputs travel
through the shared buffers of `transport`, never through the pipe.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from xtoken_core.errors import InputError
from xtoken_core.forking import start_process, start_server
from xtoken_core.losses.logits import HiddenLogits, TopKLogits
from xtoken_core.teachers.setup import Inputs, Logits, TeacherError, TeacherSetup
from xtoken_core.teachers.transport import Inbox, Shape, remove_traces
from xtoken_core.teachers.worker import teacher_main

logger = logging.getLogger(__name__)

TEACHERS_IMPORT = ["xtoken_core.teachers.worker"]
"""What the process that teachers are forked from imports."""
WARNING_SECONDS = 30.0
"""Of silence, after which a line says so, and again after as many."""
LOADING_SECONDS = 3600.0
"""In which a teacher has to load its model: it gives no sign of life meanwhile."""


class Teacher:
    """The student's handle of one teacher process."""

    def __init__(self, setup: TeacherSetup):
        self.setup = setup
        self.resident = False
        self.releases = 0
        """How often outputs of this teacher have been given back: once per run."""
        self._leased = False
        self._inbox = Inbox()
        start_server(TEACHERS_IMPORT)
        context = mp.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, setup, os.getpid(), dict(os.environ))
        self._process = context.Process(target=teacher_main, args=arguments, name=setup.name, daemon=True)
        start_process(self._process)
        theirs.close()  # so that reading ends when the teacher does

    def wait_ready(self) -> None:
        """Waits until the model is loaded. Raises InputError or TeacherError with the teacher's last words."""
        self.info = self._reply("load its model", max(LOADING_SECONDS, self.setup.timeout))

    def call(self, command: str, *arguments: Any) -> dict[str, Any]:
        """Sends a command (a method of TeacherServer) and waits for the result, with `started` and `ended` (monotonic s)."""
        self.begin(command, *arguments)
        return self.finish(command)

    def begin(self, command: str, *arguments: Any) -> None:
        """Sends a command; `finish` has to follow before the next one."""
        with contextlib.suppress(OSError):  # dead: its reply says why
            self._pipe.send((command, arguments))

    def finish(self, command: str) -> dict[str, Any]:
        """Waits for the result of the command that was sent."""
        return self._reply(command, self.setup.timeout)

    def run(self, inputs: Sequence[Inputs]) -> tuple[list[Logits], dict[str, Any]]:
        """Runs micro-batches through the teacher. The outputs are valid until `release`."""
        self.release()
        result = self.call("run", inputs)
        self._leased = True
        return self._outputs(result["shapes"]), result

    def made_up(self, inputs: Inputs) -> Logits:
        """What `run` gives of a micro-batch, in form; the numbers are random."""
        setup, places = self.setup, inputs["input_ids"].shape
        width = {"hidden": self.info["head"]["shape"][1], "logits": self.info["rows"], "topk": setup.top_k}[setup.transport]
        values = torch.randn((*places, width), dtype=setup.dtype, device=setup.device)
        if setup.transport == "topk":
            indices = torch.arange(width, dtype=torch.int32, device=setup.device).expand(values.shape)
            return self._logits([values.sort(descending=True).values], [indices.contiguous()])[0]
        return self._logits([values])[0]

    @property
    def shared_bytes(self) -> int:
        """Bytes of the buffers that both processes map."""
        return self._inbox.nbytes

    def release(self) -> None:
        """Gives the outputs of the last run back, once."""
        if self._leased:
            self._leased = False
            self.releases += 1

    def check(self) -> None:
        """Raises TeacherError if the process is no longer alive."""
        if not self._process.is_alive():
            self._answer(*self._received())

    def close(self) -> None:
        """Ends the process and unmaps its buffers. Harmless when repeated."""
        self.release()
        self._inbox.close()
        if self._pipe.closed:
            return
        with contextlib.suppress(OSError):
            self._pipe.send(("close", ()))
        for end in (lambda: None, self._process.terminate, self._process.kill):
            end()
            self._process.join(5)
            if self._process.exitcode is not None:
                break
        self._pipe.close()
        if self._process.pid is not None:
            remove_traces(self._process.pid)

    def _reply(self, task: str, limit: float) -> dict[str, Any]:
        """Waits for the answer to a command; `limit`: seconds that may pass without a sign of life."""
        heard, warning = time.monotonic(), WARNING_SECONDS
        while (silence := time.monotonic() - heard) < limit:
            if silence >= warning:
                told = (self.setup.name, silence, task, limit)
                logger.warning("%s: no sign of life for %.0f s while it has to %s; the run ends after %g s", *told)
                warning += WARNING_SECONDS
            if wait([self._pipe, self._process.sentinel], min(warning, limit) - silence):
                kind, result = self._received()
                if kind != "alive":
                    return self._answer(kind, result)
                heard, warning = time.monotonic(), WARNING_SECONDS
        self._process.kill()
        raise TeacherError(f"{self.setup.name}: no sign of life for {limit:g} s while it had to {task}")

    def _answer(self, kind: str, result: Any) -> dict[str, Any]:
        if kind == "bad input":
            raise InputError(f"{self.setup.name}: {result}")
        if kind == "failed":
            raise TeacherError(f"{self.setup.name}: {result}")
        self._inbox.receive(result.pop("handles", {}))
        answer: dict[str, Any] = result
        return answer

    def _received(self) -> tuple[str, Any]:
        """The next message of the process. Raises TeacherError where it has died."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self._pipe.poll():
                kind, result = self._pipe.recv()
                return kind, result
        self._process.join(60)  # it is about to be gone, at the latest when the machine has time for it
        raise TeacherError(f"{self.setup.name}: its process died ({_cause(self._process.exitcode)})")

    def _outputs(self, shapes: list[Shape]) -> list[Logits]:
        dtype, tensors = self.setup.dtype, self._inbox.tensors
        if self.setup.transport == "topk":
            return self._logits(tensors("values", shapes, dtype), tensors("indices", shapes, torch.int32))
        return self._logits(tensors(self.setup.transport, shapes, dtype))

    def _logits(self, values: list[Tensor], indices: Sequence[Tensor] = ()) -> list[Logits]:
        """What is handed over of each micro-batch (and of `topk` its ids) as logits."""
        dtype, rows = self.setup.dtype, self.info["rows"]
        if self.setup.transport == "logits":
            return list(values)
        if self.setup.transport == "topk":
            return [TopKLogits(v, i, rows) for v, i in zip(values, indices)]
        head = self.info["head"]
        (weight,) = self._inbox.tensors("head", [head["shape"]], dtype)
        bias = self._inbox.tensors("bias", [head["shape"][:1]], dtype)[0][:rows] if head["bias"] else None
        return [HiddenLogits(h, weight[:rows], bias, head["scale"], head["softcap"]) for h in values]


def _cause(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
