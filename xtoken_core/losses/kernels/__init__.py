"""The losses as Triton kernels: logits are read once or twice, the gradient is written once, and nothing of size [T, V] stands beside them.

    rows.py             log-sum-exp, argmax and target logit of each row
    rowsets.py          which rows count
    chunks.py           the rows of each chunk
    columns.py          the teacher's columns: maxima, gather
    choose.py           which of them are K, and in which order
    teacher_columns.py  the teacher within K
    touched.py          the student's columns that W maps into K
    project.py          p_kl: projection by W
    projected.py        p_kl: chunk KL
    weights.py          p_kl: gradient by W
    within.py           same vocabulary, within K
    whole.py            same vocabulary, whole: averaged logits
    common.py           gold, h_kl: common columns
    ranks.py            gold, h_kl: sorted uncommon columns
    counting.py         its steps
    gradient.py         the one pass that writes the gradient of all terms
    tile_gradient.py    what the terms leave for it
    gradient_parts.py   what each teacher adds to it
    sources.py          logits from hidden states, and gradients back
    totals.py           sums over rows and chunks
    tiles.py            where a batch may be cut
    terms.py            one teacher's term, put together
    batch.py            all of a batch, put together
    launch.py           cheaper launches
    autograd.py         all of it, differentiable
    compared.py         partition_kl: which rows are compared
    cell_masses.py      partition_kl: masses of cells
    scored_cells.py     partition_kl: the same of a teacher's scores
    realised.py         partition_kl: realised chunks, and sums by column
    partition.py        partition_kl: KL and gradient
    modes.py            `term_sums`: partition_kl beside the others

Sums are formed in a fixed order: the same inputs give the same bits. Nothing waits for the device, except that from hidden states of more than
one tile the places of the cuts are fetched once.
"""

from xtoken_core.losses.kernels.chunks import valid_chunks
from xtoken_core.losses.kernels.modes import term_sums
from xtoken_core.losses.kernels.rowsets import counted_tokens

__all__ = ["counted_tokens", "term_sums", "valid_chunks"]
