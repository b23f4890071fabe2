"""What configurations and tokenizers of the models say against the spec, found before anything is prepared or trained."""

from __future__ import annotations

import tempfile
from collections.abc import Collection

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from xtoken_core.configs import check_attention, empty_model, head_rows, positions, read_config
from xtoken_core.errors import InputError, in_one_line
from xtoken_core.layers import prune_layers
from xtoken_core.same_vocabulary import check_same_vocabulary
from xtoken_core.spec import DistillationSpec, StudentSpec, TeacherSpec
from xtoken_core.tokenization import TokenTable, load_tokenizer

_ROWS = ("data.train", "data.validation")


def check_models(spec: DistillationSpec, chats: Collection[str] = ()) -> None:
    """Reads every model's configuration, builds its shapes, prunes the student's and loads the tokenizers.

    chats: fields of texts that are chats. Raises InputError, which names the field, for a model that will not load, rows longer than a model has positions, an
    attention that a model lacks, layers that the student cannot do without, what could not be saved in the end, and a tokenizer that does not fit.
    """
    refs = {"student.model": spec.student.model} | {f"teachers.{t.id}.model": t.model for t in spec.teachers}
    known: dict[str, int] = {}
    for field, ref in refs.items():
        try:
            config = read_config(ref)
            model = empty_model(ref, config)
        except InputError as e:
            raise InputError(f"{field}: {e}") from None
        known[field] = config.get_text_config().vocab_size
        check_attention(ref, config, spec.training.attention)
        bound = positions(config)
        for limit, length in (("data.max_length", spec.data.max_length), ("evaluation.window", spec.evaluation.window)):
            if bound is not None and length is not None and length > bound:
                raise InputError(f"{limit}: {length} tokens a row, but {field} ({ref}) has {bound} positions")
        if field == "student.model":
            if spec.student.keep_layers is not None:
                prune_layers(model, spec.student.keep_layers)
            _check_saving(field, ref, model.config)
    _check_tokenizers(spec, known, chats)


def shared_rows(spec: DistillationSpec) -> int:
    """Ids that the student and every teacher of its vocabulary have a row of the lm_head for; with a tokenizer at a URI, rows. Raises InputError."""
    heads = [head_rows(ref) for ref in (spec.student.model, *(t.model for t in spec.teachers if not t.cross_tokenizer))]
    tokenizer = _tokenizer(spec.student)
    return min(heads if tokenizer is None else [len(TokenTable.from_tokenizer(tokenizer)), *heads])


def _check_tokenizers(spec: DistillationSpec, rows: dict[str, int], chats: Collection[str]) -> None:
    """Raises InputError for an lm_head with fewer rows than its tokenizer has ids, for a teacher of another vocabulary, and for chats
    without a template.

    rows: of the lm_head of the model that each field names. A tokenizer at a URI is left to the overlap step, since the whole
    model is downloaded with it.
    """
    measured = {"evaluation.texts" if spec.evaluation.texts else "data.validation"} if spec.measures_bits else set()
    student = _tokenizer(spec.student)
    if student is not None:
        _check_saving("student.model", spec.student.model, student)
        _check_rows("student.model", spec.student.model, rows, student)
        _check_template("student", spec.student, student, {*_ROWS, *measured}.intersection(chats))
    for index, teacher in enumerate(spec.teachers):
        tok = _tokenizer(teacher)
        if not teacher.cross_tokenizer and student is not None and tok is not None:
            check_same_vocabulary(student, tok, f"teachers.{index} ({teacher.id})")
        read = tok if teacher.cross_tokenizer else student  # a teacher of the student's vocabulary is fed the student's ids
        if read is not None:
            _check_rows(f"teachers.{teacher.id}.model", teacher.model, rows, read)
        if tok is not None:
            own = {*_ROWS, *measured} if teacher.cross_tokenizer else measured  # the others' rows are the student's
            _check_template(f"teachers.{teacher.id}", teacher, tok, own.intersection(chats))


def _check_saving(field: str, ref: str, part: PreTrainedConfig | PreTrainedTokenizerFast) -> None:
    """Raises InputError for what can be loaded and not be saved again: better known before the training than after it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            part.save_pretrained(folder)
        except Exception as e:  # of a configuration that contradicts itself transformers raises many kinds
            raise InputError(f"{field}: {ref}: cannot be saved after the training: {in_one_line(e)}") from None


def _check_template(field: str, side: StudentSpec | TeacherSpec, tok: PreTrainedTokenizerFast, chats: Collection[str]) -> None:
    """Raises InputError for chats, in one of the fields `chats`, that the tokenizer has no template for."""
    if chats and not tok.chat_template:
        raise InputError(
            f"{field}.model: {side.tokenizer or side.model}: its tokenizer has no chat template, which the chats of {min(chats)} need; "
            f"{field}.tokenizer may name one that has"
        )


def _tokenizer(side: StudentSpec | TeacherSpec) -> PreTrainedTokenizerFast | None:
    return None if "://" in (side.tokenizer or side.model) else load_tokenizer(side.model, side.tokenizer)


def _check_rows(field: str, ref: str, rows: dict[str, int], read: PreTrainedTokenizerFast) -> None:
    ids = TokenTable.from_tokenizer(read).min_rows
    if rows[field] < ids:
        raise InputError(f"{field}: {ref}: its lm_head has {rows[field]} rows, fewer than the {ids} ids that it is to read")
