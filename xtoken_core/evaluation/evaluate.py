"""What a model is worth: bits per byte of held-out text, agreement with teachers, benchmarks, samples of its text.

How two results differ, and whether by more than the noise: `report.verdict`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from xtoken_core import storage
from xtoken_core.configs import compute_dtype
from xtoken_core.data.documents import Document, read_documents
from xtoken_core.data.records import text_of
from xtoken_core.data.rows import Side, empty
from xtoken_core.data.tokenizing import DocumentTokenizer
from xtoken_core.errors import InputError, NonFiniteError, blamed
from xtoken_core.evaluation.agreement import agreement
from xtoken_core.evaluation.bits_per_byte import opener_of, token_nats
from xtoken_core.evaluation.intervals import ratio_interval
from xtoken_core.evaluation.samples import samples
from xtoken_core.layers import prune_layers
from xtoken_core.models import Loaded, load
from xtoken_core.results.evaluation import BitsPerByte, CorpusBits, Documents, Evaluation
from xtoken_core.results.subject import BEFORE, Subject
from xtoken_core.spec import DistillationSpec, StudentSpec, TeacherSpec
from xtoken_core.tokenization import row_bos


def evaluate(
    spec: DistillationSpec,
    subject: Subject,
    checkpoint: str | Path | None = None,
    rows: str | Path | None = None,
    projections: Mapping[str, Path | str] | None = None,
    modes: Mapping[str, str] | None = None,
) -> Evaluation:
    """Measures one model by what `spec.evaluation` asks for.

    Args:
        spec: the run.
        subject: who is measured.
        checkpoint: folder of a trained student; None: the spec names the model.
        rows: folder that holds the validation rows in `validation`, for the agreement of a student; None: none is measured.
        projections: file of W by teacher id, for the agreement.
        modes: loss mode by teacher id, for the agreement.

    Raises InputError, and NonFiniteError for a model whose cross-entropy of a text is not finite.
    """
    started = time.perf_counter()
    loaded, reference = load_for(spec, subject, checkpoint)
    result: dict[str, Any] = {}
    student = subject.role != "teacher"
    if spec.measures_bits:
        documents = held_out(spec)
        measured = time.perf_counter()
        with blamed(subject.key):
            result["bits_per_byte"], tokens = measure_bits(spec, loaded, documents)
        result["tokens_per_second"] = tokens / (time.perf_counter() - measured)
        result["samples"] = samples(loaded.model, loaded.tokenizer, documents)
    validation = rows and Path(rows) / "validation"
    if student and validation and validation.exists():
        result["agreement"] = agreement(spec, loaded, validation, projections or {}, modes or {})
    if spec.evaluation.tasks:
        from xtoken_core.evaluation.harness import run_tasks

        folder = reference if _as_it_lies(spec, subject, reference) else None
        result["tasks"] = run_tasks(spec.evaluation, loaded.model, loaded.tokenizer, folder)
    seconds = time.perf_counter() - started
    about = {"subject": subject, "model": reference, "window": spec.context, "stride": stride_of(spec.context)}
    return Evaluation(**about, seconds=seconds, **result)


def load_for(spec: DistillationSpec, subject: Subject, checkpoint: str | Path | None) -> tuple[Loaded, str]:
    """The model (on the GPU, if there is one; in what `training.precision` computes in) with its tokenizer, and where it is from.

    Raises InputError.
    """
    dtype, device = compute_dtype(spec.training.precision), "cuda" if torch.cuda.is_available() else "cpu"
    named = _named(spec, subject)
    reference, tokenizer = (named.model, named.tokenizer) if checkpoint is None else (str(checkpoint), None)
    loaded = load(reference, tokenizer, subject.key, dtype, spec.training.attention)
    if subject == BEFORE and spec.student.keep_layers is not None:
        prune_layers(loaded.model, spec.student.keep_layers)
    loaded.model.to(device)  # type: ignore[arg-type]  # transformers wraps it untyped
    return loaded, reference


def _named(spec: DistillationSpec, subject: Subject) -> StudentSpec | TeacherSpec:
    """What the spec says of the subject's model."""
    return spec.student if subject.teacher is None else next(t for t in spec.teachers if t.id == subject.teacher)


def _as_it_lies(spec: DistillationSpec, subject: Subject, reference: str) -> bool:
    """Whether another program that loads the reference gets the same model and tokenizer."""
    trained = subject.state in ("best", "last")
    changed = not trained and (_named(spec, subject).tokenizer or (subject == BEFORE and spec.student.keep_layers))
    return not changed and not storage.is_remote(reference) and not reference.endswith(".gguf")


def held_out(spec: DistillationSpec) -> list[Document]:
    """The documents to measure on: `evaluation.texts`, else `data.validation`. Raises InputError for no text in them."""
    uris = spec.evaluation.texts or spec.data.validation
    documents = [document for document in read_documents(uris, spec.data) if text_of(document.content)]
    if not documents:
        raise InputError(f"{'evaluation.texts' if spec.evaluation.texts else 'data.validation'}: no text")
    return documents


def stride_of(window: int) -> int:
    """Tokens by which windows move on: half of one, so that a token has at least as many before it."""
    return max(1, window // 2)


def measure_bits(spec: DistillationSpec, loaded: Loaded, documents: Sequence[Document]) -> tuple[BitsPerByte, int]:
    """The `bits_per_byte` of a result, and how many tokens it took. Raises NonFiniteError."""
    tok = loaded.tokenizer
    ids, counted, sizes = _tokens(spec, tok, documents)
    nats = token_nats(loaded.model, ids, opener_of(tok), row_bos(tok), spec.context, stride_of(spec.context))
    bits = np.array([float(n[c].sum()) for n, c in zip(nats, counted)]) / np.log(2)
    if not np.isfinite(bits).all():
        raise NonFiniteError(f"its cross-entropy of {documents[int(np.isfinite(bits).argmin())].source} is not finite")
    corpora = np.array([document.corpus for document in documents])
    per_corpus = {
        name: CorpusBits(documents=int(here.sum()), bytes=int(sizes[here].sum()), **bits_interval(bits[here], sizes[here]))
        for name in sorted(set(corpora.tolist()))
        for here in [corpora == name]
    }
    each = Documents(corpus=corpora.tolist(), bits=bits.tolist(), bytes=sizes.tolist())
    return BitsPerByte(per_corpus=per_corpus, documents=each, **bits_interval(bits, sizes)), sum(map(len, ids))


def _tokens(
    spec: DistillationSpec, tok: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Per document its ids, which of them count (bool), and the bytes they stand for: all of a text, a chat's targets."""
    side = Side.of("the model", "student", tok)
    tokenize = DocumentTokenizer([side], spec.data.model_copy(update={"eos": False}))
    ids, counted, sizes = [], [], []
    for document, found in zip(documents, tokenize(documents)):
        if isinstance(found, str):  # no words of it are measured; every model has an entry for every document
            print(f"warning: {document.source}: not measured: {found}", file=sys.stderr)
            found = empty(1)
        # a token that ends a turn is a target, but no text
        measured = (found.targets[0] > 0) & (found.widths[0] > 0)
        size = int(found.widths[0][measured].sum())
        if isinstance(document.content, str):
            measured, size = np.ones(len(found.ids[0]), bool), len(document.content.encode())
        ids.append(found.ids[0])
        counted.append(measured)
        sizes.append(size)
    return ids, counted, np.array(sizes)


def bits_interval(bits: np.ndarray, sizes: np.ndarray) -> dict[str, float | None]:
    """Bits per byte over documents [N] with its 95 % bootstrap interval over them: total, low, high.

    None for one document: how much its parts differ tells how even it is, and not how other documents would come out.
    """
    low, high = ratio_interval(bits, sizes) if len(bits) > 1 else (None, None)
    return {"total": float(bits.sum() / sizes.sum()), "low": low, "high": high}
