"""Image files to pictures: upright, RGB, eight bits; animations as films."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ringworld_workers.data.files import DataError
from ringworld_workers.data.sampling import (
    MAX_PIXELS,
    Picture,
    Reel,
    SampledFrame,
    Sampling,
    check_size,
    check_stretch,
    moments,
    spread_moments,
    square,
    take,
)

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")
"""Formats whose further pictures are a film; others hold pages, or one picture several times."""
_LEAST_DELAY = 0.02
_USUAL_DELAY = 0.1
"""Seconds; browsers show a picture of a shorter delay than the least for this long."""


_DAMAGED = (OSError, SyntaxError, ValueError, IndexError, EOFError, TypeError, struct.error)
"""What the decoders raise for damaged files is not of one class."""


def is_image(path: Path) -> bool:
    """Whether a file begins as an image does, whatever its name says.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with _opened(path):
            return True
    except UnidentifiedImageError:
        return False
    except _DAMAGED as error:
        # An image whose header is damaged; an OSError with a number is of the file system.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return True


def sample_image(
    path: Path, sampling: Sampling, size: int, on_picture: Callable[[], None] = lambda: None
) -> Iterator[SampledFrame]:
    """The frame of an image at 0 s, or the sampled frames of an animation.

    EXIF's orientation is applied, transparency is laid on white, sixteen bits become eight.

    Args:
        path: a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.
        sampling: which frames; a still image has no stretch to take.
        size: pixels of a side of the result.
        on_picture: see ``sample_media``.

    Raises:
        DataError: the file is damaged, too large or too small; names no path.
    """
    try:
        with _opened(path) as image:
            check_size(image.width, image.height)
            if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
                yield from _sample_animation(image, sampling, size, on_picture)
                return
            if sampling.start > 0 or sampling.end is not None:
                raise DataError("a still image has no stretch; take start and end out")
            yield SampledFrame(0.0, 0.0, square(_pixels(image), size, sampling.crop))
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"cannot be decoded: {_reason(error)}") from error


def _sample_animation(
    image: Image.Image, sampling: Sampling, size: int, on_picture: Callable[[], None]
) -> Iterator[SampledFrame]:
    delays = []
    for number in range(getattr(image, "n_frames", 1)):
        on_picture()
        image.seek(number)
        image.load()
        delay = float(image.info.get("duration", 0)) / 1000
        delays.append(delay if delay >= _LEAST_DELAY else _USUAL_DELAY)
    starts = np.cumsum([0.0, *delays])
    last, ends = float(starts[-2]), float(starts[-1])
    check_stretch(sampling, last, ends)
    spread = sampling.max_frames is not None
    times = spread_moments(sampling, last) if spread else moments(sampling)
    yield from take(
        Reel(_pictures(image, starts[:-1].tolist(), on_picture)), times, size, sampling.crop
    )


def _pictures(
    image: Image.Image, starts: list[float], on_picture: Callable[[], None]
) -> Iterator[Picture]:
    for number, start in enumerate(starts):
        on_picture()
        image.seek(number)
        yield Picture(start, partial(np.array, _pixels(image)))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; its pixels are not read yet."""
    with path.open("rb") as file, warnings.catch_warnings():
        # Pillow warns of sizes that it would still decode; ``check_size`` refuses them.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise DataError(
                f"a picture of more than {MAX_PIXELS:,} pixels, the limit; scale it"
            ) from error
        with image:
            yield image


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 RGB [H, W, 3]."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow would cut sixteen bits off at 255.
        grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.mode == "F":
        raise DataError("pixels are floating-point numbers without a scale; save it as 8 bits")
    if upright.has_transparency_data:
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return np.asarray(upright.convert("RGB"))


def _reason(error: Exception) -> str:
    """What went wrong, without the path that an OSError's text carries."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
