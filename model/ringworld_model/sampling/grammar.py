"""The grammar of what a model may write: text, and clips of whole frames between delimiters.

    answer = text (<vision> clip </vision> text)*
    clip   = (codes eof)* codes eov

``<vision>`` and ``</vision>`` are text ids, several of them perhaps; the model opens a clip by
writing the first, codes and ends are vision ids. A pure state machine: states are values, and the
same tokens lead every rank to the same state. A frame is begun only where it can be finished, with
what must follow it, in the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ringworld_model.batch import TEXT, VISION


class Allowed(NamedTuple):
    """Which token may come next.

    Attributes:
        modality: TEXT or VISION: whose head and table.
        ids: the ids to choose from; None: every id of the modality.
        banned: ids that are not among them.
    """

    modality: int
    ids: range | tuple[int, ...] | None
    banned: tuple[int, ...] = ()

    def contains(self, token: int) -> bool:
        """Whether ``token`` is one of them; the modality's size is not checked."""
        return (self.ids is None or token in self.ids) and token not in self.banned


@dataclass(frozen=True, slots=True)
class State:
    """Where a row is in the grammar.

    Attributes:
        tail: the last text ids, as many as might begin ``<vision>``.
        clip: frames finished of the clip that is open; -1 where none is.
        place: tokens of the present frame so far.
        closing: ids of ``</vision>`` still to come.
        made: frames finished since the start, those of the prompt not counted.
    """

    tail: tuple[int, ...] = ()
    clip: int = -1
    place: int = 0
    closing: tuple[int, ...] = ()
    made: int = 0

    @property
    def in_clip(self) -> bool:
        """Whether the next token is a vision id."""
        return self.clip >= 0

    @property
    def free(self) -> bool:
        """Whether the row may end here: outside clips and their delimiters."""
        return not self.in_clip and not self.closing


@dataclass(frozen=True, slots=True)
class Grammar:
    """The rules for one model and one request.

    Attributes:
        codebook_size: codes; eof is this id, eov the one after it. 0: text only.
        codes_per_frame: codes of one frame.
        start_ids: text ids of ``<vision>``.
        end_ids: text ids of ``</vision>``.
        max_frames: frames that may be made in all; 0 opens no clip.
        clip_frames: frames that every clip has, those of the prompt included; None: the model
            says when a clip ends.
    """

    codebook_size: int = 0
    codes_per_frame: int = 256
    start_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    max_frames: int | None = None
    clip_frames: int | None = None

    def __post_init__(self) -> None:
        """Refuse rules that nothing could follow.

        Raises:
            ValueError: names the field, the value and the remedy.
        """
        if self.codebook_size and not (self.start_ids and self.end_ids):
            raise ValueError(
                "grammar.start_ids and grammar.end_ids are empty; encode <vision> and </vision> "
                "with the text tokenizer"
            )
        for name, least in (("codes_per_frame", 1), ("max_frames", 0), ("clip_frames", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"grammar.{name}={value} is below {least}")

    @property
    def eof_id(self) -> int:
        """Vision id that ends a frame that another follows."""
        return self.codebook_size

    @property
    def eov_id(self) -> int:
        """Vision id that ends the last frame of a clip."""
        return self.codebook_size + 1

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame, its end included."""
        return self.codes_per_frame + 1

    def start(self, tokens: Sequence[int], modality: Sequence[int]) -> State:
        """The state after a prompt.

        What spells ``<vision>`` there and has text behind it is text: a person may write of it. So
        it is at the prompt's end where no clip may be opened.

        Args:
            tokens: of the prompt, ids in the spaces of ``modality``.
            modality: one a token.

        Raises:
            ValueError: the prompt breaks the grammar; says at which token.
        """
        state = State()
        for at, (token, kind) in enumerate(zip(tokens, modality, strict=True)):
            # A prompt's text may follow a clip in any form that the user gives it.
            if kind == TEXT and state.closing and token != state.closing[0]:
                state = replace(state, closing=())
            if kind == TEXT:
                state = self._unspelled(state)
            if kind != (VISION if state.in_clip else TEXT) or (
                state.in_clip and not self._fits(state, token)
            ):
                raise ValueError(
                    f"prompt token {at} ({'vision' if kind == VISION else 'text'} id {token}) "
                    f"does not fit: {self._wanted(state)}; build clips with vision_tokens, "
                    "between the ids of <vision> and </vision>, with the model's own codebook"
                )
            state = self._advanced(state, token)
        if self.max_frames == 0:
            state = self._unspelled(state)
        return replace(state, made=0)

    def allowed(self, state: State, room: int) -> Allowed:
        """What may come next.

        Args:
            state: of the row.
            room: tokens that the row may still take, at least 1.
        """
        if state.closing:
            return Allowed(TEXT, state.closing[:1])
        if not state.in_clip:
            return Allowed(TEXT, None, self._unopened(state, room))
        if state.place < self.codes_per_frame:
            return Allowed(VISION, range(self.codebook_size))
        if self.clip_frames is not None and state.clip + 1 < self.clip_frames:
            return Allowed(VISION, (self.eof_id,))
        done = state.made + 1
        spent = self.max_frames is not None and done >= self.max_frames
        full = self.clip_frames is not None
        cramped = room < 1 + self.frame_tokens + len(self.end_ids)
        if spent or full or cramped:
            return Allowed(VISION, (self.eov_id,))
        return Allowed(VISION, (self.eof_id, self.eov_id))

    def advance(self, state: State, token: int) -> State:
        """The state after a token that ``allowed`` contains."""
        return self._advanced(state, token)

    def check_room(self, state: State, room: int) -> None:
        """Refuse a prompt that ends in a clip whose least rest does not fit.

        Args:
            state: after the prompt.
            room: tokens that the row may still take.

        Raises:
            ValueError: says what is needed, what there is, and the remedy.
        """
        if not state.in_clip:
            if len(state.closing) > room:
                raise ValueError(
                    f"the prompt ends a clip whose </vision> takes {len(state.closing)} more "
                    f"tokens, and {room:,} are left; shorten the prompt"
                )
            return
        whole = max(1, (self.clip_frames or 0) - state.clip)
        if self.clip_frames is not None and state.clip >= self.clip_frames:
            raise ValueError(
                f"the prompt's clip has {state.clip} frames already, and clip_frames is "
                f"{self.clip_frames}; ask for more frames than the prompt has"
            )
        if self.max_frames is not None and whole > self.max_frames:
            raise ValueError(
                f"the prompt opens a clip of {whole} more frames, and max_frames is "
                f"{self.max_frames}; raise it, or end the prompt in text"
            )
        need = whole * self.frame_tokens - state.place + len(self.end_ids)
        if need > room:
            raise ValueError(
                f"the prompt opens a clip that takes {need:,} more tokens ({whole} frames of "
                f"{self.frame_tokens} and </vision>), and {room:,} are left; shorten the prompt, "
                "ask for fewer frames, or for more tokens"
            )

    def _unopened(self, state: State, room: int) -> tuple[int, ...]:
        """The id that would open a clip now, where no clip may be opened."""
        if not self.codebook_size or not self._opens_next(state):
            return ()
        frames = self.clip_frames or 1
        left = None if self.max_frames is None else self.max_frames - state.made
        need = 1 + frames * self.frame_tokens + len(self.end_ids)
        if need > room or (left is not None and left < frames):
            return (self.start_ids[-1],)
        return ()

    def _opens_next(self, state: State) -> bool:
        before = self.start_ids[:-1]
        return not before or state.tail[-len(before) :] == before

    def _unspelled(self, state: State) -> State:
        """The state where ``<vision>``, if it has just been written, is text."""
        if (state.clip, state.place) != (0, 0):
            return state
        return State(tail=self.start_ids[1:], made=state.made)

    def _fits(self, state: State, token: int) -> bool:
        if state.place < self.codes_per_frame:
            return 0 <= token < self.codebook_size
        return token in (self.eof_id, self.eov_id)

    def _advanced(self, state: State, token: int) -> State:
        if state.closing:
            return replace(state, closing=state.closing[1:])
        if not state.in_clip:
            if self.codebook_size and self._opens_next(state) and token == self.start_ids[-1]:
                return replace(state, tail=(), clip=0, place=0)
            kept = len(self.start_ids) - 1
            return replace(state, tail=(*state.tail, token)[-kept:] if kept > 0 else ())
        if state.place < self.codes_per_frame:
            return replace(state, place=state.place + 1)
        made = state.made + 1
        if token == self.eov_id:
            return State(closing=self.end_ids, made=made)
        return replace(state, clip=state.clip + 1, place=0, made=made)

    def _wanted(self, state: State) -> str:
        if not state.in_clip:
            return "outside a clip there is text"
        if state.place < self.codes_per_frame:
            return (
                f"code {state.place} of frame {state.clip} must be a vision id below "
                f"{self.codebook_size}"
            )
        return f"frame {state.clip} must end in eof {self.eof_id} or eov {self.eov_id}"
