"""Verifying reads everything: what is whole is called sound, what is not is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringworld_workers.checkpoint.layout import CHUNK_BYTES, CheckpointRef, Manifest
from ringworld_workers.checkpoint_tools.verify import VerifyReport, verify
from ringworld_workers.store.base import Store, StoreError
from ringworld_workers.store.file_store import FileStore

# A tensor of several chunks, and small ones, of which one is not in every rank's object.
TENSORS: dict[str, Any] = {
    "big": np.arange(3 * CHUNK_BYTES // 4 + 5, dtype=np.float32),
    "small": np.linspace(-1, 1, 21).reshape(3, 7),
    "one": np.ones(1),
}


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "checkpoints")


def problems(report: VerifyReport) -> list[str]:
    assert not report.sound
    found = list(report.problems)
    for held in report.objects:
        found += [f"{held.key.rpartition('/')[2][:10]}: {text}" for text in held.problems]
    return found


def manifest_of(store: Store, ref: CheckpointRef) -> Manifest:
    key = f"{ref.key}/manifest.json"
    return Manifest.from_json(store.get(key), key)


def change(store: FileStore, key: str, edit: Callable[[bytearray], object]) -> None:
    path = store.root / key
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def test_what_is_whole_is_sound(store: FileStore, write_checkpoint: Callable[..., Any]) -> None:
    ref = write_checkpoint(store, TENSORS, ranks=3)
    store.put(f"{ref.key}/rank-00000-of-a-save-before.bin", [b"left"])
    read: list[int] = []
    report = verify(store, ref, read.append)
    assert report.sound and len(report.objects) == 3
    size = sum(held.size for held in report.objects)
    assert size == sum(value.size for value in TENSORS.values()) * 12
    assert report.bytes_read == sum(read) == size
    assert [info.key[-10:] for info in report.unreferenced] == ["before.bin"]


def test_every_kind_of_damage_is_named(
    store: FileStore, write_checkpoint: Callable[..., Any]
) -> None:
    ref = write_checkpoint(store, TENSORS, ranks=4)
    first, second, third, fourth = manifest_of(store, ref).objects
    part = next(r for r in first.ranges if (r.tensor, r.kind) == ("small", "exp_avg"))

    def flip(data: bytearray) -> None:
        data[part.offset] ^= 1
        data[-1] ^= 128

    change(store, first.key, flip)
    change(store, second.key, lambda data: data.__delitem__(slice(-5, None)))
    change(store, third.key, lambda data: data.append(0))
    store.delete(fourth.key)
    found = problems(verify(store, ref))
    end = part.offset + part.length_bytes
    assert found[0] == (
        f"rank-00000: bytes {part.offset:,} to {end:,}, of exp_avg of small: the checksum is wrong"
    )
    assert found[1].startswith("rank-00000: bytes ") and "of exp_avg_sq of small" in found[1]
    assert found[2:] == [
        f"rank-00001: it is cut off: it holds {second.size - 5:,} bytes instead of {second.size:,}",
        f"rank-00002: it is too long: it holds {third.size + 1:,} bytes instead of {third.size:,}",
        "rank-00003: it is missing",
    ]


def test_a_manifest_that_cannot_be_read_is_a_finding(
    store: FileStore, write_checkpoint: Callable[..., Any]
) -> None:
    ref = write_checkpoint(store, TENSORS)
    change(store, f"{ref.key}/manifest.json", lambda data: data.__setitem__(40, data[40] ^ 1))
    assert "manifest.json is damaged" in problems(verify(store, ref))[0]


def test_a_byte_that_was_flipped_on_its_way_is_read_again(
    store: FileStore, write_checkpoint: Callable[..., Any]
) -> None:
    class Noisy(FileStore):
        noise = 1

        def read_into(self, key: str, offset: int, buffers: Any) -> None:
            super().read_into(key, offset, buffers)
            if self.noise:
                self.noise -= 1
                buffers[0][0] ^= 1

    ref = write_checkpoint(store, TENSORS)
    noisy = Noisy(store.root)
    assert verify(noisy, ref).sound and noisy.noise == 0


def test_a_store_that_fails_is_no_finding(
    store: FileStore, write_checkpoint: Callable[..., Any]
) -> None:
    class Away(FileStore):
        def read_into(self, key: str, offset: int, buffers: Any) -> None:
            raise StoreError("read", key, "the server is away", transient=True)

    with pytest.raises(StoreError, match="the server is away"):
        verify(Away(store.root), write_checkpoint(store, TENSORS))


def test_bytes_and_moments_that_nobody_checks_are_named(
    store: FileStore, write_checkpoint: Callable[..., Any]
) -> None:
    ref = write_checkpoint(store, TENSORS, ranks=1)
    manifest = manifest_of(store, ref)
    (held,) = manifest.objects
    kept = tuple(part for part in held.ranges if part.kind == "param")
    changed = dataclasses.replace(manifest, objects=(dataclasses.replace(held, ranges=kept),))
    store.put(f"{ref.key}/manifest.json", [changed.to_json()])
    unchecked = held.size * 2 // 3
    assert problems(verify(store, ref)) == [
        "no object holds exp_avg, which adamw needs",
        "no object holds exp_avg_sq, which adamw needs",
        f"rank-00000: {unchecked:,} of its bytes are in no range, and have no checksum",
    ]
