"""What `evaluate:` asks for, against the context that it is asked in."""

from __future__ import annotations

import sys
from pathlib import Path

from ringworld_jobs.eval_spec import NEED_DATA, EvalSpec
from ringworld_jobs.evaluate_spec import EvaluateSpec, Evaluations, asked_for
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.problem import KeyPath
from ringworld_jobs.store_url import UnsafeUrl, parse_store
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


def check_eval_job(checked: Checked[EvalSpec]) -> None:
    """Report what no field of a job of evaluations can know alone."""
    spec, report = checked.spec, checked.document.report
    if spec is None:
        return
    if isinstance(spec.evaluate, EvaluateSpec) and not any(spec.evaluate.tasks()):
        report(("evaluate",), "nothing is asked; name a task, such as needle: {}")
    if spec.context_length is not None and checked.sound(("context_length",), ("evaluate",)):
        check_evaluations(checked, spec.evaluate, spec.context_length, ("evaluate",))
    if checked.sound(("evaluate",), ("data",)) and not (spec.data.sources or spec.data.recipe):
        for name in (name for name, _ in spec.evaluations.tasks() if name in NEED_DATA):
            report(
                ("evaluate",),
                f"{name} scores held-out data, and the job names none; give data.sources or "
                "data.recipe, such as those of the job that trained the model",
            )
    check_workers(checked)


def check_generate_job(checked: Checked[GenerateSpec], base: Path, *, check_files: bool) -> None:
    """Report what no field of a job of prompts can know alone.

    Args:
        checked: the validated file; problems go into its document.
        base: its folder.
        check_files: also look at the prompts.
    """
    spec, report = checked.spec, checked.document.report
    if spec is None:
        return
    if checked.sound(("context_length",), ("to",)):
        # Without one, it is the model's, which is looked for later.
        for field, message in spec.problems(spec.context_length or sys.maxsize):
            if checked.sound((field,)):
                report((field,), message)
    if spec.out is not None and "://" in spec.out and checked.sound(("out",)):
        try:
            parse_store(spec.out)
        except ValueError as error:
            report(("out",), str(error), secret=isinstance(error, UnsafeUrl))
    if check_files and checked.sound(("prompts",), ("to",)):
        for field, message in spec.file_problems(base):
            report((field,), message)
    check_workers(checked)


def check_workers(checked: Checked[EvalSpec] | Checked[GenerateSpec]) -> None:
    """Report a mesh that the job's workers cannot form."""
    spec, report = checked.spec, checked.document.report
    if spec is not None and checked.sound(("mesh",), ("resources",)):
        mesh, most = spec.mesh_for(spec.context_length or 1), spec.resources.workers.max
        if mesh.world_size > most:
            report(
                ("mesh",),
                f"{mesh} = {mesh.world_size} workers, and resources.workers.max is {most}; raise "
                f"it to {mesh.world_size} or make the mesh smaller",
            )
