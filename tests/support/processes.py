"""The teacher processes of a student, as the system sees them."""

from __future__ import annotations

import contextlib

import psutil


def forkservers(student: int) -> list[psutil.Process]:
    """The processes that the student's teachers are forked from: one, or none before the first teacher."""
    return [child for child in psutil.Process(student).children() if is_forked(child)]


def teacher_processes(student: int) -> list[psutil.Process]:
    """The teachers of the process `student`, in the order in which they started."""
    teachers = [teacher for server in forkservers(student) for teacher in server.children()]
    return sorted(teachers, key=lambda process: process.create_time())


def is_forked(process: psutil.Process) -> bool:
    """Whether it is a forkserver or one of its copies, and alive."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE and any("multiprocessing.forkserver" in a for a in process.cmdline())
    return False
