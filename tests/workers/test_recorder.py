"""A rank's outbox: what is known to be read, and what a lost reply costs."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from ringworld_workers.log_lines import BURST_LINES, HIDDEN, Flood, Redaction
from ringworld_workers.recorder import Recorder, RecorderHandler


def test_a_lost_reply_loses_no_record() -> None:
    recorder = Recorder()
    recorder.metrics({"step": 1})
    first = recorder.drain(0)
    recorder.metrics({"step": 2})

    assert recorder.drain(0)[: len(first)] == first
    assert [entry.data["step"] for entry in recorder.drain(first[-1].seq)] == [2]


def test_records_count_as_stored_once_the_reader_asks_for_what_follows() -> None:
    recorder = Recorder()
    assert recorder.stored(recorder.position()), "nothing was said yet"
    recorder.metrics({"step": 1})
    position = recorder.position()

    read = recorder.drain(0)
    assert not recorder.stored(position), "the reply may be lost on its way"
    recorder.metrics({"step": 2})
    recorder.drain(read[-1].seq)

    assert recorder.stored(position)
    assert not recorder.stored(recorder.position())


class Ring:
    """A place in a ring, as ``RingStats`` keeps it."""

    hops = hop = 0
    awaits: int | None = None


def test_hops_of_the_ring_are_progress_and_are_counted_once() -> None:
    recorder, ring = Recorder(), Ring()
    ring.hops = 7  # of what was computed before this phase
    recorder.phase("forward", 3, ring)
    assert (recorder.progress().count, recorder.progress().hop) == (1, 0)
    ring.hops, ring.hop, ring.awaits = 9, 2, 5
    beat = recorder.progress()
    assert (beat.phase, beat.step, beat.count, beat.hop, beat.awaits) == ("forward", 3, 3, 2, 5)

    recorder.phase("backward", 3, ring)
    ring.hops, ring.awaits = 10, None
    assert recorder.progress().count == 5, "two phases and three hops"
    ring.hops = 0  # reset: nothing counts backwards
    assert recorder.progress().count == 4
    recorder.phase("optimizer", 3)
    beat = recorder.progress()
    assert (beat.count, beat.hop, beat.awaits) == (5, 0, None)


def logger_of(recorder: Recorder, environment: dict[str, str] | None = None) -> Any:
    logger = logging.Logger("ringworld_workers.test")
    handler = RecorderHandler(recorder, Redaction(environment or {}))
    logger.addHandler(handler)
    return logger, handler


def lines_of(recorder: Recorder) -> list[dict[str, Any]]:
    return [json.loads(entry.data) for entry in recorder.drain(0)]


def test_a_log_line_says_who_and_where() -> None:
    recorder = Recorder()
    logger, handler = logger_of(recorder)
    logger.info("early")
    handler.place(rank=3, stage="4k", attempt=2, node="10.0.0.7")
    recorder.phase("forward", 12)
    try:
        raise ValueError("no room\nat all")
    except ValueError as error:
        logger.error("failed: %s", "line one\nline two\u2028", exc_info=error)

    early, failed = lines_of(recorder)
    assert (early["level"], early["message"], early["step"]) == ("INFO", "early", 0)
    assert "rank" not in early and "traceback" not in early
    trace = failed.pop("traceback")
    assert trace.startswith("Traceback") and trace.endswith("ValueError: no room\nat all")
    assert abs(failed.pop("time") - time.time()) < 60
    assert failed == {
        "level": "ERROR",
        "rank": 3,
        "stage": "4k",
        "attempt": 2,
        "node": "10.0.0.7",
        "step": 12,
        "logger": "ringworld_workers.test",
        "message": "failed: line one\nline two\u2028",
    }
    (_, line) = [entry.data for entry in recorder.drain(0)]
    assert len(line.splitlines()) == 1


def test_no_secret_is_logged() -> None:
    environment = {
        "AWS_SECRET_ACCESS_KEY": "abcd/efgh+1234",
        "HF_TOKEN": "hf_0123456789",
        "SHORT_TOKEN": "false",
        "AWS_SHARED_CREDENTIALS_FILE": "keys/aws-credentials",
        "HOSTNAME": "machine-number-seven",
    }
    recorder = Recorder()
    logger, _ = logger_of(recorder, environment)
    logger.info("with abcd/efgh+1234 and hf_0123456789, false, on machine-number-seven")
    logger.info("https://user:pass-word@host/x?X-Amz-Signature=0a1b2c&other=1 s3://bucket/a@b")
    try:
        raise OSError("refused hf_0123456789")
    except OSError:
        logger.exception("in keys/aws-credentials")

    first, second, third = lines_of(recorder)
    expected = "with [secret] and [secret], false, on machine-number-seven"
    assert first["message"] == expected
    assert second["message"] == (
        "https://[secret]@host/x?X-Amz-Signature=[secret]&other=1 s3://bucket/a@b"
    )
    assert third["message"] == "in keys/aws-credentials"
    assert "hf_0123456789" not in third["traceback"] and HIDDEN in third["traceback"]


def test_a_flood_is_cut_and_counted_and_trouble_still_gets_through() -> None:
    now = [0.0]
    flood = Flood(clock=lambda: now[0])
    assert [flood.passes() for _ in range(BURST_LINES + 3)] == [True] * BURST_LINES + [False] * 3
    now[0] += 1.0
    assert [flood.passes() for _ in range(51)] == [True] * 50 + [False]
    assert flood.left_out == 4

    recorder = Recorder()
    logger, _ = logger_of(recorder)
    for number in range(BURST_LINES + 200):
        logger.info("chatter %d", number)
    logger.warning("trouble")
    lines = lines_of(recorder)
    assert lines[-1]["message"] == "trouble" and len(lines) < BURST_LINES + 150

    logger.info("x" * 20_000)
    assert len(lines_of(recorder)[-1]["message"]) < 10_000
