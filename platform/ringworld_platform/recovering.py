"""What a run does about a failure of its gang, by what it knows of itself.

``recovery.decide`` says what most failures lead to; here are those that depend on the run: rows to
leave out after training has diverged, a store to wait for, memory that was not enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ringworld_platform.live_run import LiveRun
from ringworld_platform.memory_advice import describe_memory
from ringworld_platform.recovery import Decision, Failure, FailureKind, decide, delay_after
from ringworld_platform.run_state import next_attempt


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision, and what it changes in the run's record.

    Attributes:
        decision: restart or give up.
        fields: of the record, for the next attempt.
    """

    decision: Decision
    fields: dict[str, Any] = field(default_factory=dict)


class Recovering:
    """Judges one run's failures, one after another."""

    def __init__(self, live: LiveRun, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Judge this run's, by a clock in seconds."""
        self._live, self._spec, self._clock = live, live.spec, clock
        self._away_since = 0.0
        self._away_at: tuple[str | None, int] | None = None
        self._num_away = 0
        self._short_at: tuple[int, str | None] | None = None
        """Stage and checkpoint of the last gang that had not memory enough."""

    def plan(self, failure: Failure) -> Plan:
        """What follows from a failure, and what it changes.

        Rows that are left out from now on get an event of their own.
        """
        record = self._live.record
        if failure.kind is FailureKind.DIVERGED:
            plan = self._roll_back(failure)
        elif failure.kind is FailureKind.STORE:
            plan = Plan(self._wait_for_store(failure))
        elif failure.kind is FailureKind.OUT_OF_MEMORY:
            plan = Plan(self._with_less_memory(failure))
        else:
            plan = Plan(self._decide(failure))
        decision = plan.decision
        if not decision.restart:
            return plan
        common = {
            "restarts": record.restarts + (0 if decision.free else 1),
            "attempt": next_attempt(record),
            "error": None if failure.kind is FailureKind.TAKEN_AWAY else failure.text,
        }
        return Plan(decision, common | plan.fields)

    def _decide(self, failure: Failure) -> Decision:
        limit = self._spec.recovery.max_restarts
        return decide(failure, restarts=self._live.record.restarts, max_restarts=limit)

    def _roll_back(self, failure: Failure) -> Plan:
        """Leave rows out from the newest checkpoint on, unless that did not help the last time."""
        record, facts = self._live.record, failure.facts
        limit = self._spec.recovery.max_rollbacks
        step = int(facts.get("step", 0))
        before = record.left_out.get(record.stage_index, [])
        wanted = [int(each) for each in facts.get("skip_steps", [])]
        new = sorted(set(wanted) - set(before))
        if facts.get("action") != "rollback":
            return Plan(Decision(False, 0.0, failure.text))
        if not new or step - 1 in before:
            what = f"step {step - 1}" if step - 1 in before else f"step {step}"
            return Plan(
                Decision(
                    False,
                    0.0,
                    f"{failure.text}; given up, for the rows of {what} were left out already and "
                    "it diverges all the same: lower learning_rate.peak or optimizer.clip_norm",
                )
            )
        if record.rollbacks >= limit:
            return Plan(
                Decision(
                    False,
                    0.0,
                    f"{failure.text}; given up after {record.rollbacks} rollbacks of this stage "
                    f"(recovery.max_rollbacks={limit})",
                )
            )
        text = self._left_out_text(new)
        self._live.event("rollback", text, steps=new, checkpoint=record.checkpoint)
        left_out = {**record.left_out, record.stage_index: sorted({*before, *new})}
        fields = {"left_out": left_out, "rollbacks": record.rollbacks + 1}
        decision = Decision(True, 0.0, f"{failure.text}; {text}", free=True)
        return Plan(decision, fields)

    def _left_out_text(self, steps: list[int]) -> str:
        record = self._live.record
        rows_per_step = self._spec.stages[record.stage_index].rows_per_step
        rows = ", ".join(
            f"step {step} (rows {(step - 1) * rows_per_step} to {step * rows_per_step - 1})"
            for step in steps
        )
        place = record.checkpoint or "the initial weights"
        return f"goes back to {place} and leaves out {rows} of stage {record.stage}"

    def _wait_for_store(self, failure: Failure) -> Decision:
        """Build the gang again, later and later, until the store is back or time is up."""
        record, limit = self._live.record, self._spec.recovery.store_timeout
        place, now = (record.checkpoint, record.global_step), self._clock()
        if place != self._away_at:
            self._away_at, self._away_since, self._num_away = place, now, 0
        waited = now - self._away_since
        if waited > limit:
            return Decision(
                False,
                0.0,
                f"{failure.text}; the store has been away for {waited:.0f} s "
                f"(recovery.store_timeout is {limit:g} s): resume the run once it is back",
            )
        self._num_away += 1
        delay = delay_after(self._num_away)
        text = f"{failure.text}; waits for the store, tries again in {delay:g} s"
        return Decision(True, delay, text, free=True)

    def _with_less_memory(self, failure: Failure) -> Decision:
        """Once more at most: what two gangs have not room for, a third has not either."""
        record = self._live.record
        told = describe_memory(self._live.folder.path, self._spec, record, failure)
        failure = replace(failure, text=f"{failure.text}; {told}")
        place = record.stage_index, record.checkpoint
        again, self._short_at = place == self._short_at, place
        if again:
            text = f"{failure.text}; given up, for a gang before it had not enough either"
            return Decision(False, 0.0, text)
        return self._decide(failure)
