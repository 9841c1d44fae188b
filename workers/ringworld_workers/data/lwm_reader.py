"""LWM's own JSONL as examples: the field syntax applied to each line.

The sequences are those of LWM's release, but for its stray BOS: there the vision datasets put one
before each text and each delimiter. Nothing is cut off in silence either: codes that are not whole
frames are refused.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringworld_jobs.lwm_fields import Field, holds_codes, parse_layout
from ringworld_jobs.problem import nearest
from ringworld_jobs.recipe_text import LwmDataset
from ringworld_workers.data.chat_template import clip_parts
from ringworld_workers.data.draft import Draft, Part, Refused, SpecialPart, TextPart, WorkItem
from ringworld_workers.data.files import DataError
from ringworld_workers.data.json_lines import kind
from ringworld_workers.data.media_store import CodeGeometry
from ringworld_workers.data.records import Record, RecordFiles, records, require_text


class LwmReader:
    """The lines of one LWM dataset, each an example."""

    def __init__(
        self,
        name: str,
        dataset: LwmDataset,
        base: Path,
        geometry: CodeGeometry | None,
        seed: int = 0,
    ) -> None:
        """Remember what to read; nothing is read yet.

        Args:
            name: of the dataset.
            dataset: its files and layouts.
            base: folder of the recipe.
            geometry: of the codebook that the codes come from; None: there is none, and every key
                is a text, as in the text datasets of LWM's release.
            seed: of the recipe, which draws the held-out share.

        Raises:
            DataError: ``fields`` is no layout.
        """
        self._name, self._dataset, self._geometry = name, dataset, geometry
        self._files = RecordFiles(name, dataset, dataset.files, base, seed)
        if dataset.fields:
            try:
                parse_layout(dataset.fields, codes=geometry is not None)
            except ValueError as error:
                raise DataError(f"datasets.{name}.fields: {error}") from error

    def items(self) -> Sequence[WorkItem]:
        """The files by label, large ones in parts.

        Raises:
            DataError: a pattern of files or held_out matches nothing.
        """
        return self._files.items()

    def training_texts(self, item: WorkItem) -> Iterator[str]:
        """Texts of the lines that are not held out; codes, not known yet maybe, are not read."""
        for record in records(item):
            if isinstance(record, Refused):
                continue
            if self._files.certainly_held_out(item.file, record.digest):
                continue
            with suppress(ValueError):  # drafts() refuses the line
                layout = self._layout(record)
                for number, field in enumerate(_parsed(layout, self._geometry is not None)):
                    if field.keys and not self._holds_codes(field):
                        yield self._text(record, field, number)

    def drafts(self, item: WorkItem) -> Iterator[Draft | Refused]:
        """The item's examples; a line that does not hold what its layout says is refused."""
        held_out = self._files.named_held_out(item.file)
        for record in records(item):
            if isinstance(record, Refused):
                yield record
                continue
            try:
                layout = self._layout(record)
                parts = tuple(self._parts(record, layout))
            except ValueError as error:
                yield Refused(record.name, str(error))
                continue
            yield Draft(f"{record.name}, {layout}", record.digest, parts, held_out)

    def _layout(self, record: Record) -> str:
        """The example's layout; of a list, one is drawn as LWM does.

        That is, by Python's own generator, seeded with the line's number from 0.
        """
        key = self._dataset.fields_from_example
        if not key:
            return self._dataset.fields
        chosen = _value(record, key)
        if isinstance(chosen, list):
            if not chosen:
                raise ValueError(f"{key!r} is an empty list; it names at least one layout")
            index = self._dataset.fields_index
            if index is None:
                chosen = random.Random(record.number - 1).choice(chosen)
            elif index < len(chosen):
                chosen = chosen[index]
            else:
                raise ValueError(
                    f"{key!r} lists {len(chosen)} layouts, and fields_index asks for number "
                    f"{index}, counted from 0"
                )
        return require_text(f"{key!r}", chosen)

    def _parts(self, record: Record, layout: str) -> Iterator[Part]:
        dataset = self._dataset
        if dataset.add_bos_token:
            yield SpecialPart("bos", loss=False)
        for number, field in enumerate(_parsed(layout, self._geometry is not None)):
            if field.token is not None:
                yield SpecialPart(field.token, field.loss)
            elif self._geometry is not None and holds_codes(field.keys[0]):
                codes = self._codes(record, field, self._geometry)
                yield from clip_parts(codes, loss=field.loss)
            else:
                yield TextPart(self._text(record, field, number), field.loss)
        if dataset.add_eos_token:
            yield SpecialPart("eos", loss=True)

    def _holds_codes(self, field: Field) -> bool:
        return self._geometry is not None and holds_codes(field.keys[0])

    def _text(self, record: Record, field: Field, number: int) -> str:
        """Texts of a field, joined; before those of the first field stands ``prepend_text``."""
        texts = []
        for key in field.keys:
            value = _value(record, key)
            if isinstance(value, list):
                raise ValueError(
                    f"{key!r} holds a list, expected text; codes need codes: or the recipe's "
                    f"codebook:, and a key that holds 'vision'"
                )
            texts.append(require_text(f"{key!r}", value))
        start = self._dataset.prepend_text if number == 0 else ""
        return start + self._dataset.subfield_separator.join(texts)

    def _codes(self, record: Record, field: Field, geometry: CodeGeometry) -> npt.NDArray[np.int32]:
        """Codes int32 [F, C] of a field, subsampled to max_frames."""
        key = field.keys[0]
        values = _value(record, key)
        if not isinstance(values, list):
            raise ValueError(
                f"{key!r} holds {kind(values)}, expected a list of codes, which is what a key that "
                f"holds 'vision' names; call a text something else"
            )
        size, stride = geometry.codebook_size, geometry.codes_per_frame
        for place, value in enumerate(values):
            if type(value) is not int:
                raise ValueError(f"{key!r}[{place}] is {kind(value)}, expected a whole number")
            if not 0 <= value < size:
                raise ValueError(
                    f"{key!r}[{place}] (frame {place // stride}) is {value}, outside the codebook "
                    f"of {size} codes, 0 to {size - 1}; end ids are added here and not stored"
                )
        if not values or len(values) % stride:
            raise ValueError(
                f"{key!r} holds {len(values)} codes, expected whole frames of {stride}, at least "
                f"one"
            )
        frames = np.array(values, np.int32).reshape(-1, stride)
        most = self._dataset.max_frames
        if 0 < most < len(frames):
            # As LWM does: evenly from the first to the last, rounded down.
            frames = frames[np.linspace(0, len(frames) - 1, most).astype(int)]
        return frames


def require_same_codebook(
    name: str, dataset: LwmDataset, geometry: CodeGeometry, names: Sequence[str]
) -> None:
    """Refuse codes of one codebook in a recipe of another: equal ids would mean unlike pictures.

    Args:
        name: of the dataset.
        dataset: whose ``codes`` declare where its codes come from; without them all is well.
        geometry: of the recipe's codebook.
        names: what the recipe's codebook is called: its digest, kind, path.

    Raises:
        DataError: names the entry, what it declares and what the recipe has.
    """
    codes = dataset.codes
    if codes is None:
        return
    where = f"datasets.{name}.codes"
    for entry in ("codebook_size", "codes_per_frame"):
        declared, ours = getattr(codes, entry), getattr(geometry, entry)
        if declared != ours:
            raise DataError(
                f"{where}.{entry}: {declared}, but the recipe's codebook has {ours}; a recipe has "
                f"one codebook: encode the media with it, or build this dataset from a recipe of "
                f"its own"
            )
    known = [label for label in names if label]
    shortest = 8  # of a digest, as much as tells it from any other
    if not any(
        codes.codebook == label
        or (len(codes.codebook) >= shortest and label.startswith(codes.codebook))
        for label in known
    ):
        raise DataError(
            f"{where}.codebook: {codes.codebook!r}, but the recipe's codebook is "
            f"{' or '.join(known)}; codes of different codebooks cannot be mixed. If they come "
            f"from this one, give its digest"
        )


@lru_cache(maxsize=256)
def _parsed(layout: str, codes: bool) -> tuple[Field, ...]:
    return parse_layout(layout, codes=codes)


def _value(record: Record, key: str) -> object:
    if key in record.value:
        return record.value[key]
    keys = list(record.value)
    hint = nearest(key, keys) or nearest(key.strip(), keys)
    meant = f"; did you mean {hint!r}?" if hint else ""
    raise ValueError(f"no key {key!r} (its keys: {', '.join(keys[:8]) or 'none'}){meant}")
