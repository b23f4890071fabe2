"""The losses as Triton kernels: logits are read once or twice, the gradient is written once, and nothing of size [T, V] stands beside them.

    rows.py        log-sum-exp, argmax and target logit of each row
    columns.py     the teacher's columns: maxima, gather
    choose.py      which of them are K, and in which order
    rowsets.py     which rows count, and the rows of each chunk
    touched.py     the student's columns that W maps into K
    projected.py   p_kl: projection, chunk KL
    within.py      same vocabulary, within K
    whole.py       same vocabulary, whole: averaged logits
    common.py      gold, h_kl: common columns
    ranks.py       gold, h_kl: sorted uncommon columns
    gradient.py    the one pass that writes the gradient of all terms
    sources.py     logits from hidden states, and gradients back
    totals.py      sums over rows and chunks
    tiles.py       where a batch may be cut
    terms.py       one teacher's term, put together
    launch.py      cheaper launches
    autograd.py    `term_sums`: all of it, differentiable

Sums are formed in a fixed order: the same inputs give the same bits. Nothing waits for the device, except that from hidden states of more than
one tile the places of the cuts are fetched once.
"""

from xtoken_core.losses.kernels.autograd import term_sums
from xtoken_core.losses.kernels.rowsets import counted_tokens, valid_chunks

__all__ = ["counted_tokens", "term_sums", "valid_chunks"]
