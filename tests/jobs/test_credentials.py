"""A spec that holds a secret is refused, and the secret is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringworld_jobs.load import JobSpecError, load_job

JOB = """\
kind: train
name: job
data: {sources: {books: {shards: books}}}
EXTRA
stages:
- {name: a, context_length: 1Ki, rope_theta: 1e4, steps: 1, global_batch_tokens: 1Ki,
   learning_rate: {peak: 1}, mixture: {books: 1}}
"""
KEY_ID = "AKIA" + "ABCDEFGHIJKLMNOP"


@pytest.mark.parametrize(
    ("extra", "secret", "path"),
    [
        ("tracking: {password: hunter2}", "hunter2", "tracking.password"),
        ("tracking: {api_key: 8315551234}", "8315551234", "tracking.api_key"),
        ("tracking: {mlflow: 'http://me:hunter2@host'}", "hunter2", "tracking.mlflow"),
        ("tracking: {mlflow: 'http://abcdef123456@host'}", "abcdef123456", "tracking.mlflow"),
        ("checkpoint: {store: 's3://b?secret=hunter2'}", "hunter2", "checkpoint.store"),
        ("checkpoint: {every: 'password=hunter2'}", "hunter2", "checkpoint.every"),
        (f"checkpoint: {{store: {KEY_ID}}}", KEY_ID, "checkpoint.store"),
        (f"tracking: {{{KEY_ID}: 1}}", KEY_ID, "tracking"),
        (f"{KEY_ID}: 1", KEY_ID, ""),
        ("defaults: {precision: sk-0123456789abcdefghij}", "0123456789abc", "defaults.precision"),
        ("aws_secret_access_key: hunter2", "hunter2", "aws_secret_access_key"),
    ],
)
def test_secrets_are_refused_and_not_shown(
    tmp_path: Path, extra: str, secret: str, path: str
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("EXTRA", extra))
    with pytest.raises(JobSpecError) as caught:
        load_job(file, check_files=False)
    assert secret not in str(caught.value) + repr(caught.value.problems)
    (problem,) = caught.value.problems
    assert problem.path == path
    assert "environment" in problem.message


@pytest.mark.parametrize(
    "extra",
    [
        "tracking: {mlflow: 'http://mlflow:5000', experiment: tokens-per-second}",
        "checkpoint: {store: 'file:///data/user@host/runs'}",
        "defaults: {loss: {weights: token, tile_tokens: 512}}",
    ],
)
def test_what_only_looks_a_little_like_one_passes(tmp_path: Path, extra: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("EXTRA", extra))
    assert load_job(file, check_files=False).name == "job"


def test_a_dataset_may_be_called_token(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("EXTRA", "").replace("books:", "token:"))
    assert load_job(file, check_files=False).stages[0].mixture == {"token": 1.0}
