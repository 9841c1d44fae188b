"""A rank's outbox: what is known to be read, and what a lost reply costs."""

from __future__ import annotations

from ringworld_workers.recorder import Recorder


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
