"""From documents of either kind, texts and chats, to their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from xtoken_core.data.chat import ChatTokenizer
from xtoken_core.data.documents import Document
from xtoken_core.data.records import Conversation
from xtoken_core.data.rows import NO_TEXT, Row, Side, Tokenized, document_rows, load_sides, tokenize_texts, with_eos
from xtoken_core.spec import DataSpec, DistillationSpec


@dataclass(frozen=True)
class Outcome:
    """What became of a document."""

    rows: Sequence[Row] = ()
    dropped: str | None = None
    """Why it has no rows."""
    unusable: bool = False
    """It has none because it cannot be read or tokenized, not because nothing is in it."""
    cut: bool = False
    """Its only row holds less than all of it."""
    remarks: Sequence[str] = ()
    """Of how it is read: see `Tokenized`."""


class DocumentTokenizer:
    """Tokenizes, aligns and cuts documents for all sides."""

    def __init__(self, sides: Sequence[Side], data: DataSpec):
        self.sides, self.data = sides, data

    @cached_property
    def chats(self) -> ChatTokenizer:
        """What reads the chats. Raises InputError for a tokenizer without a chat template."""
        return ChatTokenizer(self.sides, self.data.assistant_only)

    def __call__(self, documents: Sequence[Document]) -> list[Tokenized | str]:
        """Each document in every tokenization, or the reason why it cannot be used."""
        usable = [document.content for document in documents if not document.unusable]
        texts = iter(tokenize_texts([content for content in usable if isinstance(content, str)], self.sides))
        chats = [content for content in usable if isinstance(content, Conversation)]
        read = iter(self.chats(chats) if chats else ())
        found: list[Tokenized | str] = []
        for document in documents:
            if document.unusable:
                found.append(document.unusable)
            elif isinstance(document.content, Conversation):
                found.append(next(read))
            else:
                text = next(texts)
                found.append(text if isinstance(text, str) else self._finished(text, document.content))
        return found

    def _finished(self, text: Tokenized, content: str) -> Tokenized:
        """A text with its end, and with a remark on names of special tokens: a chat may have been rendered into it."""
        written = [(side.name, next((name for name in side.controls if name in content), None)) for side in self.sides]
        remarks = tuple(f"{side}: {name!r} in a text is read as text; chats come as messages" for side, name in written if name)
        return replace(with_eos(text, self.sides) if self.data.eos else text, remarks=remarks)

    def outcomes(self, documents: Sequence[Document]) -> list[Outcome]:
        """What becomes of each document."""
        return [self._outcome(document, found) for document, found in zip(documents, self(documents))]

    def _outcome(self, document: Document, found: Tokenized | str) -> Outcome:
        if isinstance(found, str):
            return Outcome(dropped=found, unusable=found != NO_TEXT)
        rows = self.rows(document, found)
        if isinstance(rows, str):
            return Outcome(dropped=rows)
        cut = len(rows) == 1 and len(rows[0]["student_ids"]) < len(found.ids[0])
        return Outcome(rows, cut=cut, remarks=found.remarks)

    def rows(self, document: Document, tokenized: Tokenized) -> list[Row] | str:
        """The rows of a document, or why it has none. Of a chat only the first is kept: the rest would stand without its template."""
        whole = isinstance(document.content, Conversation)
        sides = self.chats.sides if whole else self.sides
        limits = [self.data.max_length - (side.bos is not None) for side in sides]
        return document_rows(tokenized, limits, sides, whole)


def outcomes_by(spec: DistillationSpec) -> Callable[[Sequence[Document]], list[Outcome]]:
    """What `DocumentTokenizer.outcomes` is, with tokenizers of its own: for another process."""
    return DocumentTokenizer(load_sides(spec), spec.data).outcomes
