"""A manifest comes back as it was written, and nothing that is wrong with one goes further."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_workers.checkpoint.layout import (
    CHUNK_BYTES,
    CheckpointError,
    DamagedCheckpoint,
    GroupState,
    Manifest,
    OptimizerState,
    StoredObject,
    StoredRange,
    TrainState,
    folder_of,
    parameter_digest,
)

SHAPES = {"b": (3,), "a.weight": (700, 1000), "empty": (0, 4), "one": ()}
FOLDER = folder_of(1, "32k", 7)
KEY = f"{FOLDER}/manifest.json"


def sample() -> Manifest:
    """Two objects, each with half of every tensor."""
    objects = []
    for rank in range(2):
        ranges, offset = [], 0
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            for name, shape in SHAPES.items():
                numel = math.prod(shape)
                start, stop = numel * rank // 2, numel * (rank + 1) // 2
                length = (stop - start) * 4
                if not length:
                    continue
                sums = tuple(range(7, 7 + -(-length // CHUNK_BYTES)))
                ranges.append(
                    StoredRange(name, kind, start, stop - start, offset, length, "float32", sums)
                )
                offset += length
        objects.append(StoredObject(f"{FOLDER}/rank-{rank:05d}-ab.bin", offset, tuple(ranges)))
    return Manifest(
        run_id="run-1",
        run_uid="u1",
        attempt=2,
        world_size=2,
        mesh={"data_parallel": 2},
        parameter_digest=parameter_digest(SHAPES),
        tensors=SHAPES,
        objects=tuple(objects),
        optimizer=OptimizerState("adamw", 7, (GroupState("decay", 1e-5, 0.1),)),
        state=TrainState(
            stage="32k",
            stage_index=1,
            step=7,
            tokens=70,
            cursor=14,
            rng="cmFuZG9t",
            learning_rate=1e-5,
            spec_digest="d",
            metrics={"loss": 1.5},
            final=False,
            bookmark={"sha256": "0" * 64, "epoch": [1, None]},
        ),
    )


CONTENT = json.loads(sample().to_json())


def signed(content: dict[str, Any]) -> bytes:
    """As a program would write it that knows the format."""
    unsigned = {**content, "sha256": "0" * 64}
    digest = hashlib.sha256(json.dumps(unsigned).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}).encode()


def test_manifests_round_trip() -> None:
    data = sample().to_json()
    assert Manifest.from_json(data, KEY) == sample()
    assert Manifest.from_json(data, KEY).to_json() == data == sample().to_json()
    # In other bytes, as another program might write them; the bookmark has zeros of its own.
    assert Manifest.from_json(signed(CONTENT), KEY) == sample()


def changed(*path: Any, to: Any) -> dict[str, Any]:
    content = copy.deepcopy(CONTENT)
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to(place[path[-1]]) if callable(to) else to
    return content


ROW = ("objects", 0, "ranges", 0)
FIRST = CONTENT["objects"][0]["ranges"][0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (changed("objects", 0, "name", to="../rank.bin"), "is not a name of its own"),
        (changed("objects", 0, "name", to="/etc/passwd"), "is not a name of its own"),
        (changed("objects", 0, "name", to="..%2frank.bin"), "is not a name of its own"),
        (changed("objects", 0, "name", to="01-b/step-00000001/x"), "is not a name of its own"),
        (changed("objects", 0, "name", to="manifest.json"), "is not a name of its own"),
        (changed("objects", 0, "name", to="rank-00001-ab.bin"), "is not a name of its own"),
        (changed("state", "stage", to="../../other"), "which is no folder's name"),
        (changed("run_id", to="../../other"), "which is no folder's name"),
        (changed("state", "step", to=8), "it is that of 01-32k/step-00000008"),
        (changed(*ROW, 3, to=FIRST[3] + 1), "goes past its tensor|does not fit"),
        (changed(*ROW, 2, to=-1), "has a value that is no size"),
        (changed(*ROW, 2, to=True), "has a value that is no size"),
        (changed(*ROW, 4, to=10**12), "does not fit into its"),
        (changed(*ROW, 4, to=2), "does not fit into its"),
        (changed(*ROW, 0, to=99), "names what is in no table"),
        (changed(*ROW, 7, to=[]), "has 0 checksums for"),
        (changed(*ROW, 7, to=lambda sums: [*sums[:-1], 2**32]), "a checksum that is none"),
        (changed("objects", 0, "ranges", to=lambda rows: [rows[0], *rows]), "overlap at byte 0"),
        (changed("objects", 0, "ranges", to=lambda rows: rows[1:]), "is not covered once"),
        (changed("objects", to=lambda objects: objects[1:]), "is not covered once"),
        (changed("tensors", "b", to=[4]), "is not covered once"),
        (changed("tensors", "b", to=[2**40, 2**40]), r"b has \d+ elements"),
        (changed("tensors", "b", to=[-3]), "an axis of b is no size"),
        (changed("dtypes", to=["float16"]), "dtype float16 is unknown; there is float32"),
        (changed("kinds", to=["exp_avg", "exp_avg_sq", "else"]), "kinds has no param"),
        (changed("parameter_digest", to="x"), "parameter_digest is not that of its tensors"),
        (changed("state", "learning_rate", to="fast"), "state.learning_rate is no number"),
        (changed("run_uid", to=5), "run_uid is no text"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=reason) as caught:
        Manifest.from_json(signed(content), KEY)
    assert str(caught.value).startswith(f"{KEY} is damaged (")


def test_a_manifest_of_another_folder_is_refused() -> None:
    with pytest.raises(DamagedCheckpoint, match="it is that of 01-32k/step-00000007"):
        Manifest.from_json(sample().to_json(), "01-32k/step-00000009/manifest.json")


@pytest.mark.parametrize("change", [{"version": 2}, {"version": 4}, {"chunk_bytes": 4096}])
def test_other_versions_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="this program reads version 3 in chunks") as caught:
        Manifest.from_json(signed(CONTENT | change), KEY)
    assert not isinstance(caught.value, DamagedCheckpoint), "it is not to be set aside"
    (value,) = change.values()
    assert str(value) in str(caught.value) and "use the release that wrote it" in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_damaged_byte_goes_unnoticed(data: st.DataObject) -> None:
    whole = sample().to_json()
    at = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "doubled", "lost"]))
    if kind == "flip":
        flipped = whole[at] ^ (1 << data.draw(st.integers(0, 7)))
        damaged = whole[:at] + bytes([flipped]) + whole[at + 1 :]
    else:
        damaged = {
            "cut": whole[:at],
            "doubled": whole[: at + 1] + whole[at:],
            "lost": whole[:at] + whole[at + 1 :],
        }[kind]
    with pytest.raises(CheckpointError):
        Manifest.from_json(damaged, KEY)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, step))
    return found


PLACES = places({name: value for name, value in CONTENT.items() if name != "sha256"})
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**62, 2**63, 10**30, 10**400, 1e308, -0.5, "", "..", "a/b"]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(PLACES), odd=ODD)
def test_no_forged_value_does_more_than_be_refused(path: tuple[Any, ...], odd: Any) -> None:
    """Well-formed and signed, but by someone who means ill, or by another program's mistake."""
    data = signed(changed(*path, to=odd))
    tracemalloc.start()
    try:
        found = Manifest.from_json(data, KEY)
    except CheckpointError as error:
        assert len(str(error)) < 1000
    else:
        assert found.folder == FOLDER
        for stored in found.objects:
            assert stored.key.rpartition("/")[0] == FOLDER
            assert all(r.offset + r.length_bytes <= stored.size for r in stored.ranges)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"format": "x"}', b"\xff", b"[" * 100_000, b"9" * 10_000,
     b'{"format": NaN}', b'{"format": "ringworld-checkpoint"}'],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedCheckpoint, match="manifest.json is damaged"):
        Manifest.from_json(data, KEY)
