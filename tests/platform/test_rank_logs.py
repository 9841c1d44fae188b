"""The ranks' logs: pieces that are bounded, lines of now and of earlier, and what is picked out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ringworld_platform import rank_logs
from ringworld_platform.log_records import (
    FolderLogs,
    LogReader,
    Wanted,
    in_plain,
    level_named,
    parse,
    ranks_named,
    smart_pattern,
)
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_parts import logs_in
from ringworld_workers.log_lines import log_line


def line(number: int, level: str = "INFO", **about: Any) -> str:
    return log_line(1000.0 + number, level, "ringworld_workers.x", f"line {number}", **about)


def messages(records: Any) -> list[str]:
    return [str(record["message"]) for record in records]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_logs, "PIECE_BYTES", 1000)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run-1")
    made.open("kind: train\n")
    return made


def test_a_log_is_bounded_and_keeps_its_begin_and_its_end(
    folder: RunFolder, small_pieces: None
) -> None:
    places = []
    for number in range(200):
        folder.append_log(0, [line(number)])
        places.append(folder.log_ends()[0])
    folder.append_log(1, [line(0)])

    files = sorted((folder.path / "logs").iterdir())
    assert len([file for file in files if file.name.startswith("rank-0")]) == 1 + 3
    assert sum(file.stat().st_size for file in files) <= 4 * 1000 + 200
    assert places == sorted(places), "places only grow"
    reader = LogReader(FolderLogs(folder.path), "", Wanted(ranks=frozenset({0})))
    shown = messages(reader.new())
    assert shown[0] == "line 0" and shown[-1] == "line 199" and len(shown) < 60
    # A reader who stands where lines have gone reads on behind them.
    lines, _ = rank_logs.read(folder.path, 0, places[50])
    assert json.loads(lines[0])["message"] in shown
    assert {f"logs/{file.name}" for file in files} <= set(logs_in(folder.path))

    # Another controller goes on where this one ended.
    again = RunFolder(folder.path)
    again.open()
    again.append_log(0, [line(200)])
    assert messages(LogReader(FolderLogs(folder.path), "", Wanted()).tail(1)) == ["line 200"]


def test_a_long_log_of_an_earlier_version_is_followed_by_pieces(
    folder: RunFolder, small_pieces: None
) -> None:
    old = folder.path / "logs" / "rank-0.log"
    old.write_text("".join(f"2026-11-22 12:39:26,406 INFO a.b: old {n}\n" for n in range(100)))
    folder.append_log(0, [line(1)])
    assert (folder.path / "logs" / "rank-0.5.log").exists(), "behind its 4,490 bytes"
    reader = LogReader(FolderLogs(folder.path), "", Wanted())
    shown = messages(reader.new())
    assert (shown[0], shown[99], shown[100], len(shown)) == ("old 0", "old 99", "line 1", 101)
    folder.append_log(0, [line(2)])
    assert messages(reader.new()) == ["line 2"], "what was read is not read again"


def test_lines_of_all_kinds_can_be_read() -> None:
    now = parse(line(7, "WARNING", rank=3, stage="4k", step=2, attempt=1), rank=3)
    assert (now["level"], now["stage"], now["step"], now["rank"]) == ("WARNING", "4k", 2, 3)
    assert parse(line(7), rank=5)["rank"] == 5, "it did not know its rank yet"
    old = parse("2026-11-22 12:39:26,406 ERROR ringworld_workers.actor: failed: {x}", rank=1)
    assert (old["level"], old["logger"]) == ("ERROR", "ringworld_workers.actor")
    assert old["message"] == "failed: {x}" and old["time"] % 1 == pytest.approx(0.406, abs=1e-5)
    trace = parse("  File x, line 3", 1, old)
    assert (trace["level"], trace["time"], trace["message"]) == (
        "ERROR",
        old["time"],
        "  File x, line 3",
    )
    for torn in ('{"time": 3, "mess', "{}", "[1]", "", "\x00\x01 {"):
        assert parse(torn, 2)["message"] == torn
    assert in_plain(now).endswith(" WARNING rank 3 4k/2 ringworld_workers.x: line 7")


def test_what_is_wanted_is_picked_out(folder: RunFolder) -> None:
    for rank in (0, 1):
        folder.append_log(
            rank,
            [
                line(10 * n + rank, "ERROR" if n == 2 else "INFO", stage=f"s{n % 2}", attempt=n)
                for n in range(4)
            ],
        )
    view = FolderLogs(folder.path)

    def found(**wanted: Any) -> list[str]:
        return messages(LogReader(view, "", Wanted(**wanted)).new())

    assert found() == [f"line {n}" for n in (0, 1, 10, 11, 20, 21, 30, 31)], "in order of time"
    assert found(ranks=frozenset({1})) == [f"line {n}" for n in (1, 11, 21, 31)]
    assert found(level="WARNING") == ["line 20", "line 21"]
    assert found(stage="s1", ranks=frozenset({0})) == ["line 10", "line 30"]
    assert found(attempt=3) == ["line 30", "line 31"]
    assert found(pattern=smart_pattern("LINE [12]1")) == []
    assert found(pattern=smart_pattern("line [12]1")) == ["line 11", "line 21"]
    assert messages(LogReader(view, "", Wanted()).tail(3)) == ["line 21", "line 30", "line 31"]
    assert messages(LogReader(view, "", Wanted(level="ERROR")).tail(1)) == ["line 21"]
    assert LogReader(view, "", Wanted()).tail(0) == []


def test_the_tail_of_a_long_log_is_read_from_its_end(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringworld_platform.log_records._TAIL_BYTES", 500)
    for rank in (0, 1):
        folder.append_log(rank, [line(2 * number + rank) for number in range(1000)])
    reader = LogReader(FolderLogs(folder.path), "", Wanted())
    assert messages(reader.tail(40)) == [f"line {number}" for number in range(1960, 2000)]
    assert reader.read < 500
    folder.append_log(1, [line(3000)])
    assert messages(reader.new()) == ["line 3000"]


def test_options_that_cannot_be_read_say_what_can() -> None:
    assert ranks_named(["0,2", "4-6"]) == {0, 2, 4, 5, 6}
    assert level_named("warn") == "WARNING"
    for bad in (lambda: ranks_named(["x"]), lambda: ranks_named(["5-2"]), lambda: level_named("z")):
        with pytest.raises(ValueError, match=r"write 3|there are debug, info"):
            bad()
    with pytest.raises(ValueError, match="no regular expression"):
        smart_pattern("(")
    assert isinstance(smart_pattern("a"), re.Pattern)
