"""The one exception that stands for bad input."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: one line that names the field, file or teacher at fault.

    Every command line of the project turns it into that line on stderr and exit code 2; anything else that
    escapes is a failed run (exit code 1) or a bug.
    """
