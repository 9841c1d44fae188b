"""The token format: frames as codes with eof and eov, and the layouts that join clips and text.

A clip is, per frame, its codes and one end id: eof, or eov after the last frame; an image is a
clip of one frame. Clips stand between ``<vision>`` and ``</vision>``, which are ordinary TEXT:
strings put through the text tokenizer, embedded and predicted by the text tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ringworld_model.batch import TEXT, VISION
from ringworld_model.packing import Example

VISION_START = "<vision>"
"""Text before a clip."""
VISION_END = "</vision>"
"""Text after a clip."""

Layout = Literal["text,vision", "vision,text"]
Kind = TypeVar("Kind", bound=np.generic)
LAYOUTS: tuple[Layout, ...] = ("text,vision", "vision,text")


def vision_tokens(codes: ArrayLike, codebook_size: int) -> NDArray[np.int32]:
    """Vision ids of a clip.

    Args:
        codes: ints [F, C], F >= 1 frames of C codes, each below codebook_size.
        codebook_size: codes of the codebook; eof is this id, eov the one after it.

    Returns:
        int32 [F * (C + 1)].

    Raises:
        ValueError: not two-dimensional, no frame, or a code outside the codebook.
    """
    frames = np.asarray(codes)
    if frames.ndim != 2 or 0 in frames.shape:
        raise ValueError(
            f"codes have shape {frames.shape}; expected [frames, codes per frame], neither empty"
        )
    if frames.min() < 0 or frames.max() >= codebook_size:
        raise ValueError(
            f"codes span {frames.min()}..{frames.max()}, outside a codebook of {codebook_size}; "
            "encode with the codebook that the model is built for"
        )
    ends = np.full((len(frames), 1), codebook_size, np.int32)
    ends[-1] = codebook_size + 1
    return np.concatenate([frames.astype(np.int32), ends], axis=1).reshape(-1)


def frames_of(tokens: ArrayLike, codes_per_frame: int, codebook_size: int) -> NDArray[np.int32]:
    """Codes of a clip: the inverse of ``vision_tokens``.

    Args:
        tokens: ints [F * (codes_per_frame + 1)].
        codes_per_frame: codes of one frame.
        codebook_size: codes of the codebook.

    Returns:
        int32 [F, codes_per_frame].

    Raises:
        ValueError: broken framing; says where.
    """
    ids = np.asarray(tokens, np.int32).reshape(-1)
    stride = codes_per_frame + 1
    if len(ids) == 0 or len(ids) % stride:
        raise ValueError(
            f"{len(ids)} vision tokens are not whole frames of {codes_per_frame} codes + 1 end id"
        )
    framed = ids.reshape(-1, stride)
    expected = np.full(len(framed), codebook_size, np.int32)
    expected[-1] = codebook_size + 1
    wrong = np.flatnonzero(framed[:, -1] != expected)
    if len(wrong):
        raise ValueError(
            f"frame {wrong[0]} ends in id {framed[wrong[0], -1]}, expected {expected[wrong[0]]} "
            "(eof after a frame, eov after the last)"
        )
    codes = framed[:, :-1]
    inside = ((codes >= 0) & (codes < codebook_size)).all(axis=1)
    if not inside.all():
        raise ValueError(
            f"frame {int(np.flatnonzero(~inside)[0])} holds an id outside the codebook of "
            f"{codebook_size} codes"
        )
    return codes.copy()


@dataclass(frozen=True)
class Span:
    """A run of tokens of one modality.

    Attributes:
        ids: ints [n].
        modality: TEXT or VISION.
        loss: whether the model is trained to predict these tokens.
    """

    ids: ArrayLike
    modality: int
    loss: bool = True


def join_spans(spans: Sequence[Span], following: Span | None = None) -> Example:
    """One example from spans in order: tokens, and the next token as each one's target.

    Args:
        spans: the example's content.
        following: what comes after it, where the example is a piece of something longer; its first
            token is the last position's target. Without it the last position has no loss.

    Returns:
        As many tokens as the spans hold.
    """
    parts = [*spans] if following is None else [*spans, following]
    arrays = [np.asarray(part.ids, np.int32).reshape(-1) for part in parts]
    ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    sizes = [len(array) for array in arrays]
    modality = np.repeat(np.array([part.modality for part in parts], np.uint8), sizes)
    loss = np.repeat(np.array([part.loss for part in parts], np.uint8), sizes)
    length = sum(sizes) if following is None else sum(sizes[:-1])
    return Example(
        tokens=ids[:length],
        modality=modality[:length],
        targets=_shifted(ids, length),
        target_modality=_shifted(modality, length),
        loss_mask=_shifted(loss, length),
    )


def text_example(text_ids: ArrayLike, following_id: int | None = None) -> Example:
    """A piece of pure text; loss on every token that has a predecessor.

    Args:
        text_ids: ints [n].
        following_id: the text id after the piece, where a longer document was cut.
    """
    following = None if following_id is None else Span([following_id], TEXT)
    return join_spans([Span(text_ids, TEXT)], following)


def clip_example(
    text_ids: ArrayLike,
    codes: ArrayLike,
    *,
    layout: Layout,
    start_ids: ArrayLike,
    end_ids: ArrayLike,
    codebook_size: int,
) -> Example:
    """A clip and its text, in the order that the layout says.

    Args:
        text_ids: text ids of the caption or prompt.
        codes: ints [F, C], the clip's codes.
        layout: ``text,vision`` teaches to generate, ``vision,text`` to describe.
        start_ids: text ids of ``VISION_START``.
        end_ids: text ids of ``VISION_END``.
        codebook_size: codes of the codebook.

    Returns:
        Text, delimiters and frames, with loss on everything but the first token.

    Raises:
        ValueError: unknown layout, or codes that ``vision_tokens`` refuses.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    text = [Span(text_ids, TEXT)]
    clip = [
        Span(start_ids, TEXT),
        Span(vision_tokens(codes, codebook_size), VISION),
        Span(end_ids, TEXT),
    ]
    return join_spans(text + clip if layout == "text,vision" else clip + text)


def _shifted(values: NDArray[Kind], length: int) -> NDArray[Kind]:
    """Entries 1 .. length, the last 0 where nothing follows."""
    shifted = np.zeros(length, values.dtype)
    after = values[1 : length + 1]
    shifted[: len(after)] = after
    return shifted
