"""What `evaluate:` asks for, against the context that it is asked in."""

from __future__ import annotations

from ringworld_jobs.evaluate_spec import EvaluateSpec, Evaluations, asked_for
from ringworld_jobs.problem import KeyPath
from ringworld_jobs.validate import Checked, T


def check_evaluations(
    checked: Checked[T], evaluations: Evaluations | None, context_length: int, here: KeyPath
) -> None:
    """Report tasks that the context cannot hold.

    Args:
        checked: the validated file; problems go into its document.
        evaluations: what is asked for.
        context_length: of the stage or model.
        here: path of what is asked for.
    """
    asked = asked_for(evaluations)
    for name, settings in asked.tasks():
        place = (*here, name) if isinstance(evaluations, EvaluateSpec) else here
        if not checked.sound(place):
            continue
        for field, message in settings.problems(context_length):
            checked.document.report((*place, field) if place != here else here, message)
