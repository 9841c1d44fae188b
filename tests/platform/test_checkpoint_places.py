"""What a person may write to mean a checkpoint, and what is said where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ringworld_platform.checkpoint_places import (
    Place,
    find_place,
    kept_by_spec,
    read_spec_text,
    target_of,
)
from ringworld_platform.errors import UnknownRunError
from ringworld_platform.run_state import JobRecord
from ringworld_workers.store.opening import open_store

TENSORS = {"w": [1.0, 2.0, 3.0]}
Write = Callable[..., Any]


def put_run(root: str, write: Write, run_id: str) -> str:
    """A run with checkpoints of two stages in a store; returns its url."""
    store = open_store(f"{root}/{run_id}/checkpoints")
    write(store, TENSORS, stage="4k", step=60)
    write(store, TENSORS, stage="8k", stage_index=1, step=20)
    return f"{root}/{run_id}"


def put_record(runs: Path, run_id: str, store: str) -> None:
    """What a run leaves on the machine that it was started from."""
    folder = runs / run_id
    folder.mkdir(parents=True, exist_ok=True)
    record = JobRecord(
        job=run_id.rpartition("-")[0],
        run_id=run_id,
        num_stages=2,
        run_folder=str(folder),
        spec_digest="0",
        submitted=float(run_id.rpartition("-")[2]),
    )
    (folder / "state.json").write_text(record.model_dump_json())
    (folder / "spec.yaml").write_text(yaml.safe_dump({"checkpoint": {"store": store, "keep": 5}}))


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Url of a store."""
    return f"file://{tmp_path}/store"


def assert_all_forms(root: str, forms: list[tuple[str, str, int | None]]) -> None:
    run = f"{root}/quickstart-10"
    for tail, stage, step in forms:
        place = find_place(f"{root}/quickstart{tail}", Path("none"))
        expected = (run, f"{run}/checkpoints", stage, step)
        assert (place.run_url, place.url, place.stage, place.step) == expected, tail


def test_a_url_names_a_run_or_anything_below_it(root: str, write_checkpoint: Write) -> None:
    for run_id in ("quickstart-2", "quickstart-10", "other-1"):
        put_run(root, write_checkpoint, run_id)
    folder = "01-8k/step-00000020"
    below = [
        *(("", "", None), ("/", "", None)),
        *(("/8k", "8k", None), ("/01-8k/", "01-8k", None), ("/8k/20", "8k", 20)),
        *((f"/{folder}", "01-8k", 20), (f"/{folder}/manifest.json", "01-8k", 20)),
    ]
    forms = [(f"-10{tail}", *rest) for tail, *rest in below]
    forms += [(f"-10/checkpoints{tail}", *rest) for tail, *rest in below]
    # A job's name stands for its newest run, by number.
    assert_all_forms(root, [*forms, *below])  # type: ignore[list-item]


def test_so_it_is_in_a_bucket(s3_url: str, write_checkpoint: Write) -> None:
    root = f"{s3_url}/checkpoints"  # a store may have this name too
    put_run(root, write_checkpoint, "quickstart-10")
    folder = "01-8k/step-00000020"
    assert_all_forms(
        root, [("", "", None), ("-10/8k/20", "8k", 20), (f"-10/{folder}", "01-8k", 20)]
    )
    with pytest.raises(UnknownRunError, match=rf"in {root} there are quickstart-10; write"):
        find_place(f"{root}/zzz/4k/60", Path("none"))


def test_what_is_not_there_is_said_with_what_is(
    root: str, write_checkpoint: Write, tmp_path: Path
) -> None:
    put_run(root, write_checkpoint, "quickstart-1")
    put_run(root, write_checkpoint, "other-1")
    for text, message in (
        (f"{root}/quickstrat-1", "did you mean quickstart-1?"),
        (root, f"in {root} there are other-1, quickstart-1"),
        (f"{root}/zzz/4k/60", f"in {root} there are other-1, quickstart-1"),
        (f"{root}/quickstart-1/4k/sixty", "'sixty' is no step; write 60 or step-00000060"),
    ):
        with pytest.raises(UnknownRunError) as caught:
            find_place(text, tmp_path / "none")
        assert message in str(caught.value), text


def test_checkpoints_may_lie_without_a_run(
    root: str, write_checkpoint: Write, tmp_path: Path
) -> None:
    write_checkpoint(open_store(f"{root}/bare"), TENSORS, stage="4k", step=60)
    for tail in ("", "/4k", "/00-4k/step-00000060"):
        place = find_place(f"{root}/bare{tail}", tmp_path)
        assert place.run_url == place.url == f"{root}/bare"


def test_a_name_is_that_of_a_run_of_this_machine(
    tmp_path: Path, s3_url: str, write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    put_record(runs, "quickstart-1", "file:///moved/since")
    put_record(runs, "quickstart-2", f"{s3_url}/")
    here = find_place("quickstart-1/4k/60", runs)
    assert here == Place(
        f"file://{runs}/quickstart-1",
        f"file://{runs}/quickstart-1/checkpoints",
        "4k",
        60,
        runs / "quickstart-1",
    )
    there = find_place("quickstart", runs)
    assert (there.run_id, there.url) == ("quickstart-2", f"{s3_url}/quickstart-2/checkpoints")
    assert str(here).endswith("runs/quickstart-1/4k/60")
    # The spec is read here where it is here, though the checkpoints are away.
    assert kept_by_spec(there) == 5 and b"keep" in read_spec_text(there)
    # A path, where no run has the name, and always where it begins like one.
    put_run(f"file://{tmp_path}", write_checkpoint, "kept")
    for text in ("kept", "./kept", str(tmp_path / "kept"), "kept/8k/20"):
        assert find_place(text, runs).run_url == f"file://{tmp_path}/kept"
    with pytest.raises(UnknownRunError, match=r"quickstart-2\?; write RUN, RUN/STAGE or"):
        find_place("quickstart-22", runs)
    with pytest.raises(UnknownRunError, match="too many parts"):
        find_place("quickstart-1/4k/60/7", runs)


def test_a_run_without_its_spec_is_said(root: str, write_checkpoint: Write, tmp_path: Path) -> None:
    place = find_place(put_run(root, write_checkpoint, "quickstart-1"), tmp_path)
    with pytest.raises(UnknownRunError, match="quickstart-1 has no spec.yaml"):
        read_spec_text(place)
    assert kept_by_spec(place) == 2
    open_store(place.run_url).put("spec.yaml", [json.dumps({"checkpoint": {"keep": 7}}).encode()])
    assert kept_by_spec(place) == 7


@pytest.mark.parametrize("text", ["s3://bucket/runs", "s3://bucket/runs/", "s3://bucket/runs/r-1"])
def test_a_copy_goes_into_a_store_under_its_own_name(text: str) -> None:
    assert target_of(text, "r-1").url == "s3://bucket/runs/r-1/checkpoints"


def test_a_copy_may_go_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert target_of("a/../backup", "r-1").run_url == f"file://{tmp_path}/backup/r-1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gs://bucket/run-1", "no store of kind gs://"),
        ("s3://bucket/runs/../run-1", "a part '..'"),
        ("s3://bucket/run-1?versionId=3", "nothing else"),
        ("s3://me:hidden@bucket/run-1", "nothing else"),
    ],
)
def test_a_url_that_no_store_has_is_refused_before_one_is_asked(
    text: str, said: str, tmp_path: Path
) -> None:
    """It is the user's mistake, not the store's failure; what may be a password is not shown."""
    for refused in (lambda: find_place(text, tmp_path), lambda: target_of(text, "run-1")):
        with pytest.raises(UnknownRunError) as error:
            refused()
        assert said in str(error.value) and "hidden" not in str(error.value)
