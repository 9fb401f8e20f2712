"""Tokens in, text out, one step at a time: Detokenizer.

The text handed out so far is always a prefix of decode(all tokens so far), whole characters only, and in the end
equal to it; a text that may still become a stop string is held back. Work per token depends on the token's length
and the number of stop strings, never on what came before. It does not know who asked or what a stop id is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from engine.core.errors import InvariantError
from engine.tokenization.vocabulary import PieceTable, Tokenizer

REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Delta:
    """What a push yields: text to send (may be empty), the stop string that ended it (None = goes on), and how many
    of the pushed tokens belong to the text, the one that completed the stop string included."""

    text: str
    stopped: str | None
    num_tokens_kept: int


class _Stops:
    """Finds the stop string that is complete first (ties: the longest) and knows how much text may yet be one.

    One Knuth-Morris-Pratt automaton a string: states[i] = characters of stop i that end the text so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = sorted(set(stops), key=lambda stop: -len(stop))
        self._borders = [_borders(stop) for stop in self.stops]
        self.states = [0] * len(self.stops)

    def feed(self, text: str, armed: bool) -> tuple[int, str] | None:
        """Advance by text. Returns (characters used, stop) when one is complete; unarmed, none ever is."""
        if not self.stops:
            return None
        for used, char in enumerate(text, 1):
            for index, stop in enumerate(self.stops):
                state = self.states[index]
                borders = self._borders[index]
                while state and (state == len(stop) or stop[state] != char):
                    state = borders[state - 1]
                self.states[index] = state = state + 1 if stop[state] == char else state
                if state == len(stop) and armed:
                    return used, stop
        return None

    def possible_chars(self, states: Sequence[int]) -> int:
        """Characters at the end of the text that a stop string may begin with. A whole one counts as its border:
        it was complete too early to stop (min_tokens)."""
        return max((self._borders[i][n - 1] if n == len(self.stops[i]) else n for i, n in enumerate(states)),
                   default=0)


def _borders(pattern: str) -> list[int]:
    """For each prefix of pattern, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders


class Detokenizer:
    """The text of one sequence.

    stop: strings that end it, not part of the text. min_tokens: a stop string completed by one of the first
    min_tokens tokens does not count. skip_special_tokens: leave special tokens out, as decode does.
    continues: the tokens continue a prompt, so a leading space is text and is kept (decode of the answer alone drops
    it for SentencePiece vocabularies). begun: bytes of a character that the prompt ends in the middle of
    (unfinished_bytes): if the tokens end it, the text begins with the whole character. owed: nobody was shown anything
    of it (whole_characters): where the tokens do not end it, it is U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0,
                 skip_special_tokens: bool = True, *, continues: bool = False, begun: bytes = b"", owed: bool = False
                 ) -> None:
        self._table = table = tokenizer.table
        self._pieces = table.pieces
        self._skipped = table.special_ids if skip_special_tokens else frozenset[int]()
        self._stops = _Stops(stop)
        self._min_tokens = min_tokens
        self._strip = 0 if continues else table.strip
        self._count = 0
        self._held = ""  # settled text not handed out yet
        self._stopped: str | None = None
        self._finished = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = _Run()
        self._begun = b"" if owed else begun
        if owed and begun:
            if not table.byte_runs:
                self._utf8.decode(begun)
            else:
                self._run.decode(begun)
                self._run.count, self._run.states, self._run.strip = len(begun), list(self._stops.states), self._strip

    def push(self, ids: Sequence[int]) -> Delta:
        """Add tokens; the text that is certain now. After a stop, nothing more comes and no token is kept."""
        if self._finished:
            raise InvariantError("a Detokenizer was pushed to after finish()")
        kept = 0
        for token in ids:
            if self._stopped is not None:
                break
            kept += 1
            self._count += 1
            self._add(token)
        return Delta(self._release(), self._stopped, kept)

    def finish(self) -> Delta:
        """The end: what was held back, incomplete characters as U+FFFD, as decode of the whole shows them."""
        if self._stopped is None and not self._finished:
            armed = self._count > self._min_tokens
            if self._table.byte_runs:
                self._end_run(armed)
            else:
                self._settle(self._utf8.decode(b"", True), armed)
        self._finished = True
        text, self._held = self._held, ""
        return Delta(text, self._stopped, 0)

    def _add(self, token: int) -> None:
        """One token, whatever it is."""
        if token in self._skipped or not 0 <= token < len(self._pieces):
            return
        armed = self._count > self._min_tokens
        piece = self._pieces[token]
        if self._begun and piece:
            begun, self._begun = self._begun, b""
            if 0x80 <= piece[0] < 0xC0:  # it goes on with the character
                (self._run if self._table.byte_runs else self._utf8).decode(begun)
        if not self._table.byte_runs:
            self._settle(self._utf8.decode(piece), armed)
        elif token in self._table.mixed:
            for part, is_byte in self._table.mixed[token]:
                if self._stopped is None:
                    self._add_part(part, is_byte, armed)
        else:
            self._add_part(piece, token in self._table.byte_ids, armed)

    def _add_part(self, piece: bytes, is_byte: bool, armed: bool) -> None:
        """A piece of a vocabulary with byte runs."""
        if is_byte:
            self._extend_run(piece, armed)
        else:
            self._end_run(armed)
            if self._stopped is None:
                self._settle(piece.decode(), armed)

    def _settle(self, text: str, armed: bool) -> None:
        """Text that no later token can change."""
        text = self._without_prefix(text)
        if text:
            self._held += text
            self._match(text, "", armed)

    def _match(self, text: str, pending: str, armed: bool) -> None:
        """Advance the automata by text, the last part of held + pending; on a stop, cut what is held before it."""
        found = self._stops.feed(text, armed)
        if found is not None:
            used, self._stopped = found
            whole = self._held + pending
            self._held = whole[: len(whole) - len(text) + used - len(self._stopped)]
            self._run = _Run()

    def _without_prefix(self, text: str) -> str:
        """Drop the characters that decode strips from the beginning of a whole text."""
        while self._strip and text:
            if text[0] != self._table.strip_text:
                self._strip = 0
            else:
                self._strip -= 1
                text = text[1:]
        return text

    def _extend_run(self, piece: bytes, armed: bool) -> None:
        """A byte token. Its run is text only once it has ended, but stops are looked for in what it is so far."""
        run = self._run
        if not run.count:
            run.states, run.strip = list(self._stops.states), self._strip
        run.count += 1
        chars = self._without_prefix(run.decode(piece))
        if chars:
            run.text += chars
            self._match(chars, run.text, armed)

    def _end_run(self, armed: bool) -> None:
        """A run of byte tokens is over: its text, or one U+FFFD for each of its bytes."""
        run, self._run = self._run, _Run()
        if not run.count:
            return
        if run.is_text:
            self._held += run.text
        else:
            self._stops.states, self._strip = run.states, run.strip
            self._settle(REPLACEMENT * run.count, armed)

    def _release(self) -> str:
        """Settled text, less what a stop string may begin with."""
        states = self._run.states if self._run.count else self._stops.states
        hold = 0 if self._stopped is not None else self._stops.possible_chars(states)
        cut = len(self._held) - hold
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def unfinished_bytes(table: PieceTable, prompt: Sequence[int]) -> bytes:
    """The last bytes of a prompt that begin a character and do not end it; b"" in almost every prompt."""
    return _begun(_last_bytes(table, prompt, 4))


def whole_characters(table: PieceTable, prompt: Sequence[int], text: str) -> str:
    """The text of a prompt (as decode gives it) without the character that it ends in the middle of. Of a run of byte
    tokens, what is whole before that character is text, even if the character never ends."""
    begun = unfinished_bytes(table, prompt)
    if not begun:
        return text
    if not table.byte_runs:
        return text.removesuffix(REPLACEMENT)
    run = _last_bytes(table, prompt, len(text))  # because of its end all of it was U+FFFD, one for each byte
    before = run[: -len(begun)]
    try:
        return text[: -len(run)] + before.decode()
    except UnicodeDecodeError:
        return text[: -len(begun)]


def _last_bytes(table: PieceTable, prompt: Sequence[int], enough: int) -> bytes:
    """The bytes that a prompt ends with, at least `enough` where there are as many before anything else."""
    found: list[bytes] = []
    size = 0
    for token in reversed(prompt):
        pieces = table.mixed.get(token) or ((table.piece(token), not table.byte_runs or token in table.byte_ids),)
        for piece, is_byte in reversed(pieces):
            if token in table.special_ids or not is_byte:
                return b"".join(reversed(found))
            found.append(piece)
            size += len(piece)
        if size >= enough:
            break
    return b"".join(reversed(found))


def _begun(tail: bytes) -> bytes:
    """The shortest end of `tail` that is the beginning of a character, if there is one."""
    for length in range(1, min(4, len(tail) + 1)):
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            text = decoder.decode(tail[-length:])
        except UnicodeDecodeError:
            continue
        return b"" if text else tail[-length:]
    return b""


class _Run:
    """A run of byte tokens: its text as far as it is valid, and what to go back to if it is not."""

    __slots__ = ("_utf8", "count", "states", "strip", "text", "valid")

    def __init__(self) -> None:
        self._utf8: codecs.IncrementalDecoder | None = None
        self.count = 0
        self.text = ""
        self.valid = True
        self.states: list[int] = []
        self.strip = 0

    def decode(self, piece: bytes) -> str:
        """Characters that this byte completes; "" from the first invalid one on."""
        if not self.valid:
            return ""
        if self._utf8 is None:
            self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            return self._utf8.decode(piece)
        except UnicodeDecodeError:
            self.valid = False
            return ""

    @property
    def is_text(self) -> bool:
        """Valid so far and not in the middle of a character."""
        return self.valid and (self._utf8 is None or not self._utf8.getstate()[0])
