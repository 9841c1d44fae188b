"""What every dataset kind shares: lengths, duplicates, held-out shares, kills, clusters."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ringworld_workers.data import work
from ringworld_workers.data.files import DataError, Unavailable
from ringworld_workers.data.prepare import Prepared, build
from ringworld_workers.data.shards import Dataset
from ringworld_workers.data.task_files import read_report
from ringworld_workers.data.tokenizer import load_tokenizer, train_tokenizer
from ringworld_workers.data.tokenizer_texts import Share

DIGITS = [f"{n} " * (3 + n % 5) for n in range(60)]


def make_text(seed: int, words: int) -> str:
    """Words of a small vocabulary, in some order."""
    return " ".join(f"word{(seed + 1) * n * n % 97}" for n in range(words))


def write_recipe(folder: Path, datasets: dict[str, Any], **changes: object) -> Path:
    """A recipe of text with a tokenizer of its own, beside the given files."""
    tokens = folder / "tokenizer"
    if not tokens.is_dir():
        tokens.mkdir(parents=True)
        train_tokenizer((make_text(n, 400) for n in range(3)), 300).save(tokens)
    recipe = {"kind": "data", "name": "small", "tokenizer": {"path": "tokenizer"}} | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"datasets": datasets}, sort_keys=False))
    return path


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def meta_of(prepared: Prepared, name: str = "texts") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((prepared.datasets[name] / "meta.json").read_text())
    return content


def names_of(prepared: Prepared, split: Any, name: str = "texts") -> list[str]:
    dataset = Dataset(prepared.datasets[name], split)
    return [dataset.name(index) for index in range(len(dataset))]


def test_of_equal_examples_the_first_stays(tmp_path: Path) -> None:
    folder = tmp_path / "recipe"
    write_lines(folder / "a.jsonl", ["one two", "three four", "one two"])
    write_lines(folder / "b.jsonl", ["three four", "five six", "five six "])
    texts = {"kind": "text", "files": ["*.jsonl"]}
    both = write_recipe(folder, {"texts": texts, "all": texts | {"deduplicate": False}})
    prepared = build(both, tmp_path / "cache")
    kept = ["a.jsonl line 1", "a.jsonl line 2", "b.jsonl line 2", "b.jsonl line 3"]
    assert names_of(prepared, "train") == kept
    assert meta_of(prepared)["left_out"] == {"examples equal to an earlier one": 2}
    assert len(names_of(prepared, "train", "all")) == 6
    # Across splits as well: nothing of training is held out.
    held_out = write_recipe(folder, {"texts": texts | {"held_out": ["b.jsonl"]}})
    again = build(held_out, tmp_path / "cache")
    assert names_of(again, "train") == kept[:2]
    assert names_of(again, "held_out") == kept[2:]


def test_lengths_out_of_the_band_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "recipe"
    write_lines(folder / "a.jsonl", ["x" * n for n in range(1, 30)])
    lengths = {"min_tokens": 10, "max_tokens": 20}
    texts = {"kind": "text", "files": ["*.jsonl"], "documents": lengths}
    prepared = build(write_recipe(folder, {"texts": texts}), tmp_path / "cache")
    found = sorted(Dataset(prepared.datasets["texts"], "train").lengths.tolist())
    assert found == list(range(10, 20))
    assert meta_of(prepared)["left_out"] == {
        "examples shorter than documents.min_tokens": 7,
        "examples of documents.max_tokens and longer": 12,
    }


def test_a_share_of_documents_is_held_out_and_stays_so(tmp_path: Path) -> None:
    folder = tmp_path / "recipe"
    texts = {"kind": "text", "files": ["*.jsonl"], "held_out_share": 0.3, "deduplicate": False}

    def split_of(lines: list[str]) -> dict[str, str]:
        write_lines(folder / "a.jsonl", lines)
        prepared = build(write_recipe(folder, {"texts": texts}), tmp_path / "cache")
        tokenizer = load_tokenizer(prepared.dir)
        found: dict[str, str] = {}
        for split in ("train", "held_out"):
            dataset = Dataset(prepared.datasets["texts"], split)  # type: ignore[arg-type]
            for index in range(len(dataset)):
                text = tokenizer.decode(dataset.read(index).tokens.tolist())
                assert found.setdefault(text, split) == split, "copies of it are in both splits"
        return found

    first = split_of(DIGITS)
    assert 8 <= sum(split == "held_out" for split in first.values()) <= 28
    # In another order, with copies, and among others, each document stays on its side.
    more = split_of([*reversed(DIGITS), "new", *DIGITS[:20]])
    assert {text: more[text] for text in first} == first


def test_an_endpoint_that_is_not_there_stops_the_build_and_leaves_nothing_out(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "recipe"
    texts = {"kind": "text", "files": ["*.jsonl"]}
    questions: dict[str, Any] = {
        "kind": "long_qa",
        "files": ["*.jsonl"],
        "target_tokens": 1024,
        "chunk_tokens": 100,
    }
    write_lines(folder / "a.jsonl", [make_text(1, 300)])
    with socket.socket() as deaf:  # bound, but it does not listen
        deaf.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        generator = {"url": url, "model": "m", "retries": 0}
        recipe = write_recipe(
            folder, {"texts": texts, "questions": questions | {"generator": generator}}
        )
        with pytest.raises(Unavailable, match="failed 1 times.*start the build again"):
            build(recipe, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("small-*"))


def test_a_share_of_text_is_of_fewer_documents_where_there_are_too_many() -> None:
    assert Share.of(None, 10) == Share()
    assert Share.of(10_000, 4) == Share(2500)
    assert Share.of(10_240, 100) == Share(1024, 10)
    assert Share.of(100, 5) == Share(100, 52)


@pytest.fixture
def parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of seven tasks in three datasets, with a line and a file that cannot be used."""
    monkeypatch.setattr(work, "TASK_FILES", TASK_FILES)
    folder = tmp_path / "recipe"
    (folder / "many").mkdir(parents=True)
    for number in range(4 * TASK_FILES + 6):
        path = folder / "many" / f"{number:04}.txt"
        path.write_text(f"{number % 126} and {number % 7}")
    (folder / "many" / "0050.txt").write_bytes(b"\xff")
    write_lines(folder / "lines.jsonl", [*DIGITS, DIGITS[3]])
    with (folder / "lines.jsonl").open("a") as file:
        file.write('{"text": ')
    (folder / "text.txt").write_text(make_text(5, 300))
    return write_recipe(
        folder,
        {
            "many": {"kind": "text", "files": ["many/*.txt"], "held_out_share": 0.1},
            "lines": {"kind": "text", "files": ["lines.jsonl"]},
            "one": {"kind": "text", "files": ["text.txt"]},
        },
        tokenizer={"train": {"vocabulary_size": 300, "max_bytes": 200_000}},
    )


def same_files(one: Path, two: Path) -> bool:
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    return files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file()) and all(
        (one / file).read_bytes() == (two / file).read_bytes() for file in files
    )


TASK_FILES = 32
KILLED = f"""
import os, signal, sys
from pathlib import Path
from ringworld_workers.data import work
from ringworld_workers.data.prepare import build

work.TASK_FILES = {TASK_FILES}

def watch(phase, done, total):
    print(phase, done, flush=True)
    if phase.startswith("read and tokenize") and done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

build(Path(sys.argv[1]), Path(sys.argv[2]), watch)
"""


def test_after_a_kill_only_what_is_missing_is_done(parted: Path, tmp_path: Path) -> None:
    undisturbed = build(parted, tmp_path / "undisturbed")
    command = [sys.executable, "-c", KILLED, str(parted), str(tmp_path / "cache")]
    killed = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (building,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    done = {path: path.stat().st_mtime_ns for path in building.glob("examples/*/*.arrow")}
    assert len(done) == 3
    read = sorted(read_report(path).examples for path in done)
    assert read == [TASK_FILES - 1, TASK_FILES, TASK_FILES]
    # A task that was cut off leaves a file that does not count.
    stray = next(iter(done)).with_name(".000009-stray.arrow.temporary")
    stray.write_bytes(b"half")
    phases: dict[str, int] = {}

    def watch(phase: str, number: int, total: int) -> None:
        if total:
            phases[phase.split(",")[0]] = total
        if phase.startswith("write many"):
            kept = {path: path.stat().st_mtime_ns for path in done}
            assert kept == done, "a finished task was done again"

    resumed = build(parted, tmp_path / "cache", watch)
    assert phases["read and tokenize"] == 7 - 3
    assert "count texts" not in phases
    assert same_files(undisturbed.dir, resumed.dir)
    assert resumed.refused == {"many": 1, "lines": 1, "one": 0}


@pytest.mark.ray
@pytest.mark.slow
def test_on_a_cluster_it_is_the_same_even_if_workers_are_killed(
    parted: Path, tmp_path: Path
) -> None:
    import ray

    from ringworld_workers.data.ray_items import RayMapper

    here = build(parted, tmp_path / "here")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=78_643_200,
    )
    try:
        places: set[str] = set()
        killed: list[int] = []

        def watch(phase: str, done: int, total: int) -> None:
            places.add(phase.rpartition(", ")[2])
            if phase.startswith("read and tokenize, on the cluster") and not killed:
                killed.extend(kill_a_worker())

        there = build(parted, tmp_path / "there", watch, little_bytes=0)
        assert "on the cluster" in places
        assert killed
        assert same_files(here.dir, there.dir)
        with pytest.raises(DataError, match=r"^nothing can be asked of \d$"):
            list(RayMapper().map(refuse, [1, 2]))
    finally:
        ray.shutdown()


def refuse(item: int) -> None:
    raise Unavailable(f"nothing can be asked of {item}")


def kill_a_worker() -> list[int]:
    """SIGKILL one of Ray Data's workers below this process, where one has started."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # others come and go meanwhile
            if "MapWorker" in " ".join(process.cmdline()):
                process.kill()
                return [process.pid]
    return []
