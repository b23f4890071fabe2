"""Chats: every tokenizer reads the same messages as its own template renders them, and the words of the messages align.

What a tokenizer is fed is what its `apply_chat_template` gives, token for token. Names of special tokens in the words
themselves stay text, so that no message can end a turn. Chunks lie within words that both renderings hold; where a token also
covers text of the template, or only one side has the words, there is no chunk. The token that ends a turn is one of its own,
where W pairs the two sides' tokens by role.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from xtoken_core.alignment import align
from xtoken_core.data.records import Conversation
from xtoken_core.data.rows import NO_TEXT, Chunks, Side, Tokenized
from xtoken_core.data.spelling import Speller, Spelling
from xtoken_core.data.templates import Rendering, Template, Unmapped
from xtoken_core.data.words import Words, words_of
from xtoken_core.errors import InputError, blamed
from xtoken_core.tokenization import role_pairs

_PROBE = Conversation([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}])
_LONGEST_GAP = 64
"""Characters between stretches of words (as in JSON) that may count as words, where both templates write the same."""


class ChatTokenizer:
    """Tokenizes and aligns chats for all sides.

    assistant_only: only the assistant's turns are targets and have chunks; of the others, and with it False of none,
    tokens are context. A turn's end token is a target too, so that the student learns to stop.
    """

    def __init__(self, sides: Sequence[Side], assistant_only: bool):
        """Raises InputError for a tokenizer without a chat template, or with one that cannot be run."""
        self.sides = [replace(side, bos=None) for side in sides]
        """As rows need them: a BOS, where there is one, is the template's business."""
        self.assistant_only = assistant_only
        self._spellers, self._templates = [], []
        for side in sides:
            if not side.tokenizer.chat_template:
                raise InputError(f"{side.name}: its tokenizer has no chat template, which chats need")
            speller = Speller(side)
            self._spellers.append(speller)
            self._templates.append(Template(side.tokenizer, speller.specials))
            try:
                self._templates[-1].render(_PROBE)
            except Unmapped as e:
                raise InputError(f"{side.name}: {e}") from None
        self._ends = [role_pairs(sides[0].table, side.table) for side in sides[1:]]

    def __call__(self, chats: Sequence[Conversation]) -> list[Tokenized | str]:
        """Each chat in every tokenization, or the reason why it cannot be used."""
        found: list[Tokenized | str] = []
        for chat in chats:
            try:
                found.append(self._tokenized(chat))
            except Unmapped as e:
                found.append(str(e))
        return found

    def _tokenized(self, chat: Conversation) -> Tokenized:
        """Raises Unmapped."""
        if not chat.messages:
            raise Unmapped(NO_TEXT)
        words = words_of(chat)
        said = json.dumps([chat.messages, chat.tools], ensure_ascii=False, default=str)
        roles = ("assistant",) if self.assistant_only else tuple({m["role"] for m in chat.messages})
        renderings, spellings = [], []
        for side, template, speller in zip(self.sides, self._templates, self._spellers):
            try:
                with blamed(side.name):
                    renderings.append(rendering := template.rendering(chat, words, roles))
                spellings.append(speller.spell(rendering, words, said))
            except Unmapped as e:
                raise Unmapped(f"{side.name}: {e}") from None
        shared = _shared(words, renderings)
        chunks = [
            self._chunks(words, shared, (renderings[0], renderings[s]), (spellings[0], spellings[s]), self._ends[s - 1])
            for s in range(1, len(self.sides))
        ]
        return Tokenized(
            [spelling.ids for spelling in spellings],
            [spelling.widths for spelling in spellings],
            [_targets(rendering, spelling) for rendering, spelling in zip(renderings, spellings)],
            chunks,
            _cuts(words, shared, renderings, spellings),
            tuple(f"{side.name}: {what}" for side, r in zip(self.sides, renderings) for what in r.left_out),
        )

    def _chunks(
        self,
        words: list[Words],
        shared: list[int],
        renderings: tuple[Rendering, Rendering],
        spellings: tuple[Spelling, Spelling],
        ends: dict[int, int],
    ) -> Chunks:
        """The chunks of the turns that are targets, of the student and one teacher."""
        found = [np.full(len(spelling.ids), -1, np.int32) for spelling in spellings]
        exact: list[bool] = []
        turns = {turn.message: turn for turn in renderings[1].turns}
        for turn in renderings[0].turns:
            spans = _joined_spans([i for i in shared if words[i].message == turn.message], words, renderings, spellings)
            for pair in spans:
                exact += self._meet(pair, spellings, found, len(exact))
            other = turns.get(turn.message)
            tokens = [s.end_token(t.end) for s, t in zip(spellings, (turn, other)) if t is not None]
            if (
                len(tokens) == 2
                and None not in tokens
                and ends.get(int(spellings[0].ids[tokens[0]])) == spellings[1].ids[tokens[1]]
            ):
                for side in (0, 1):
                    found[side][tokens[side]] = len(exact)
                exact.append(True)
        return found[0], found[1], np.array(exact, bool)

    def _meet(
        self,
        pair: tuple[tuple[int, int], tuple[int, int]],
        spellings: tuple[Spelling, Spelling],
        found: list[np.ndarray],
        first: int,
    ) -> list[bool]:
        """Numbers the tokens of one stretch of words by chunks, from `first` on, and says which are exact."""
        inside = [spelling.inside(*span) for spelling, span in zip(spellings, pair)]
        texts = [spelling.text[start:end] for spelling, (start, end) in zip(spellings, pair)]
        if texts[0] != texts[1]:  # a normaliser has rewritten one of them
            ids = [spelling.ids[part] for spelling, part in zip(spellings, inside)]
            try:
                met = align(ids[0], ids[1], spellings[0].table, spellings[1].table)
            except ValueError:
                return []
            for own, part, chunk in zip(found, inside, (met.student_chunk_id, met.teacher_chunk_id)):
                own[part] = np.where(chunk >= 0, chunk + first, -1)
            return list(met.exact.tolist())
        bounds = [spelling.boundaries(part) - span[0] for spelling, part, span in zip(spellings, inside, pair)]
        common = np.intersect1d(bounds[0], bounds[1])
        if len(common) < 2:
            return []
        for own, spelling, part, span in zip(found, spellings, inside, pair):
            starts, stops = spelling.starts[part] - span[0], spelling.ends[part] - span[0]
            chunk = np.searchsorted(common, starts, side="right") - 1
            own[part] = np.where((chunk >= 0) & (chunk < len(common) - 1) & (stops <= common[-1]), chunk + first, -1)
        return [True] * (len(common) - 1)


def _shared(words: list[Words], renderings: Sequence[Rendering]) -> list[int]:
    """The words that every rendering has, in an order that is the same in all."""
    everywhere = reduce(set.__and__, (set(r.places) for r in renderings))
    found: list[int] = []
    for number in sorted(everywhere, key=renderings[0].places.__getitem__):
        if all(not found or r.places[number] >= r.places[found[-1]] + len(words[found[-1]].text) for r in renderings):
            found.append(number)
    return found


def _joined_spans(
    numbers: list[int], words: list[Words], renderings: Sequence[Rendering], spellings: Sequence[Spelling]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Per stretch of words its spans on both sides, in bytes; stretches with the same text between them are one."""
    spans: list[list[list[int]]] = []
    for number in numbers:
        new = [[r.places[number], r.places[number] + len(words[number].text)] for r in renderings]
        if spans:
            gaps = {r.text[old[1] : start] for r, old, (start, _) in zip(renderings, spans[-1], new)}
            plain = all(s.is_plain(old[1], start) for s, old, (start, _) in zip(spellings, spans[-1], new))
            if len(gaps) == 1 and len(next(iter(gaps))) <= _LONGEST_GAP and plain:
                for old, (_, end) in zip(spans[-1], new):
                    old[1] = end
                continue
        spans.append(new)
    return [tuple(s.offsets(*span) for s, span in zip(spellings, pair)) for pair in spans]  # type: ignore[misc]


def _targets(rendering: Rendering, spelling: Spelling) -> np.ndarray:
    """uint8 [T]: 1 for the tokens of the turns."""
    targets = np.zeros(len(spelling.ids), np.uint8)
    for turn in rendering.turns:
        start, end = spelling.offsets(turn.start, turn.end)
        targets[(spelling.ends > start) & (spelling.starts < end)] = 1
    return targets


def _cuts(words: list[Words], shared: list[int], renderings: Sequence[Rendering], spellings: Sequence[Spelling]) -> np.ndarray:
    """int64 [K, sides]: token counts at which every side stands at the same place, from zeros to all tokens.

    Those places are behind turns, and within words where every tokenization has a boundary.
    """
    sizes = [len(spelling.ids) for spelling in spellings]
    turns = [{turn.message: turn for turn in rendering.turns} for rendering in renderings]
    cuts = [[0] * len(sizes), sizes]
    for number in shared:
        if any(words[number].message not in of for of in turns):
            continue
        spans = [s.offsets(r.places[number], r.places[number] + len(words[number].text)) for s, r in zip(spellings, renderings)]
        if len({s.text[start:end] for s, (start, end) in zip(spellings, spans)}) == 1:
            bounds = [s.boundaries(s.inside(*span)) - span[0] for s, span in zip(spellings, spans)]
            places = reduce(np.intersect1d, bounds)
            cuts += np.stack(
                [np.searchsorted(s.ends, places + span[0], side="right") for s, span in zip(spellings, spans)], 1
            ).tolist()
    for message in reduce(set.__and__, (set(of) for of in turns)):
        cuts.append([s.count(s.offsets(of[message].end, of[message].end)[0]) for s, of in zip(spellings, turns)])
    ascending = np.unique(np.array(cuts, np.int64), axis=0)
    kept = [ascending[0]]
    for cut in ascending[1:]:
        if (cut >= kept[-1]).all():
            kept.append(cut)
    return np.stack(kept)
