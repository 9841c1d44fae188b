"""A folder that follows a run's logs in a store fetches what is new, and no more."""

from __future__ import annotations

from pathlib import Path

from ringworld_platform.run_mirror import RunMirror
from ringworld_platform.run_parts import Part
from ringworld_workers.store.opening import open_store


def test_only_what_is_new_is_fetched(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path / 'store'}")
    fetched: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def get(self, key: str) -> bytes:
            fetched.append(key)
            return store.get(key)

    def put(name: str, epoch: int, offset: int, text: str) -> str:
        key = f"job-1/{Part(name, epoch, offset).key}"
        store.put(key, [text.encode()])
        return key

    folder = tmp_path / "mirror"
    mirror = RunMirror(Counting(), "job-1", folder)  # type: ignore[arg-type]
    mirror.refresh()
    assert not folder.exists() and fetched == []
    put("events.jsonl", 1, 0, "one\n")
    put("logs/rank-0.1.log", 1, 0, "hello\n")
    mirror.refresh()
    assert (folder / "events.jsonl").read_text() == "one\n"
    assert (folder / "logs" / "rank-0.1.log").read_text() == "hello\n"

    fetched.clear()
    new = put("events.jsonl", 1, 4, "two\nthree\n")
    mirror.refresh()
    mirror.refresh()
    assert fetched == [new]
    assert (folder / "events.jsonl").read_text() == "one\ntwo\nthree\n"

    # Another controller took the run over, and had seen one line only.
    put("events.jsonl", 2, 4, "other\n")
    mirror.refresh()
    assert (folder / "events.jsonl").read_text() == "one\nother\n"
