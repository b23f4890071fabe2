"""Imported last by the process that others are forked from: from then on, nobody looks for garbage in what it has imported.

A trainer collects garbage when it ends, and a copy that looks at every imported object takes memory of its own for it.
"""

import gc

gc.freeze()
gc.enable()
