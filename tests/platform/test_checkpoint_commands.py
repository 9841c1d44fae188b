"""`ringworld checkpoints ...` and `ringworld export`: output, exit codes, and one-line errors."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ringworld_jobs.resolve import resolved_yaml
from ringworld_jobs.spec import JobSpec
from ringworld_platform.cli import app
from ringworld_workers.checkpoint_tools.choose import choose_newest, manifest_of
from ringworld_workers.store.file_store import FileStore
from ringworld_workers.store.opening import open_store

TENSORS = {"embed.weight": np.arange(600.0).reshape(30, 20), "norm.weight": np.ones(20)}
COMMANDS = ("list", "show", "verify", "diff", "copy", "prune")


def ringworld(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "140", "TERM": "dumb"})


def checkpoints(*arguments: str) -> Result:
    return ringworld("checkpoints", *arguments)


@pytest.fixture
def run(tmp_path: Path, write_checkpoint: Callable[..., Any]) -> Path:
    """A run's folder, as a path: two stages, and what a killed save has left."""
    folder = tmp_path / "quickstart-1"
    store = FileStore(folder / "checkpoints")
    for step in (4, 8, 12, 16):
        write_checkpoint(store, TENSORS, step=step, final=step == 16)
    write_checkpoint(store, TENSORS, stage="8k", stage_index=1, step=4, ranks=3)
    store.put("01-8k/step-00000008/rank-00000-ffff0000.bin", [b"x" * 1000])
    return folder


def damage(run: Path, tail: str) -> None:
    store = FileStore(run / "checkpoints")
    stage, step = tail.split("/")
    held = manifest_of(store, choose_newest(store, stage, int(step))).objects[0]
    path = store.root / held.key
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command: str) -> None:
    shown = checkpoints(command, "--help")
    assert shown.exit_code == 0 and f"$ ringworld checkpoints {command} " in shown.output


def test_list(run: Path) -> None:
    shown = checkpoints("list", str(run))
    assert shown.exit_code == 0, shown.output
    rows = shown.stdout.splitlines()
    assert rows[0] == f"file://{run}/checkpoints"
    assert "held-out loss" in rows[1] and "ring x dp" in rows[1]
    assert [row.split()[:2] for row in rows[2:7]] == [
        *(["4k", step] for step in ("4", "8", "12", "16")),
        ["8k", "4"],
    ]
    assert "text 2.500" in rows[5] and rows[5].split()[-1] == "end" and "3 x 1" in rows[6]
    assert "01-8k/step-00000008  a save that was not committed" in shown.stdout
    found = json.loads(checkpoints("list", f"file://{run}/4k", "--json").stdout)
    assert [(c["step"], c["final"]) for c in found["checkpoints"]][-1] == (16, True)
    newest = found["checkpoints"][-1]
    assert newest["bytes"] == 620 * 12 and abs(newest["committed"] - time.time()) < 60
    (left,) = json.loads(checkpoints("list", str(run), "--json").stdout)["leftovers"]
    assert (left["kind"], left["bytes"]) == ("uncommitted", 1000)


def test_a_manifest_that_cannot_be_read_is_listed(run: Path) -> None:
    (run / "checkpoints/00-4k/step-00000008/manifest.json").write_text("{}")
    shown = checkpoints("list", str(run))
    assert shown.exit_code == 0 and "manifest.json is damaged" in shown.stdout
    assert checkpoints("verify", f"{run}/4k/8").exit_code == 1


def test_show(run: Path) -> None:
    shown = checkpoints("show", str(run))
    assert shown.exit_code == 0, shown.output
    for text in (
        "01-8k/step-00000004",
        "quickstart-1, attempt 1",
        "620 (620) in 2 tensors",
        "no_decay: learning rate 0.001, weight decay 0",
        "embed.weight",
        "30 x 20",
        "rank-00002-0000abcd.bin",
    ):
        assert text in shown.stdout, text
    assert "norm.weight" in checkpoints("show", f"{run}/4k/8", "--tensors").stdout
    found = json.loads(checkpoints("show", f"{run}/4k/8", "--json").stdout)
    assert found["state"]["step"] == 8 and found["tensors"]["embed.weight"] == [30, 20]


def test_verify_tells_sound_damaged_and_unknown(run: Path) -> None:
    shown = checkpoints("verify", str(run))
    assert shown.exit_code == 0 and "all 5 are sound" in shown.stdout
    damage(run, "4k/8")
    shown = checkpoints("verify", str(run))
    assert shown.exit_code == 1
    assert "00-4k/step-00000008: DAMAGED" in shown.stdout
    assert "bytes 0 to 1,200, of param of embed.weight: the checksum is wrong" in shown.stdout
    assert "1 of 5 damaged: 00-4k/step-00000008" in shown.stderr
    found = json.loads(checkpoints("verify", f"{run}/4k/8", "--json").stdout)
    assert found[0]["sound"] is False and len(found[0]["objects"][0]["problems"]) == 1
    assert checkpoints("verify", f"{run}/4k/4").exit_code == 0
    absent = checkpoints("verify", f"{run}/4k/5")
    assert absent.exit_code == 2 and "there are 4, 8, 12, 16" in absent.stderr
    assert checkpoints("verify", f"{run}-none").exit_code == 2


def test_diff_answers_like_diff(run: Path, write_checkpoint: Callable[..., Any]) -> None:
    store = FileStore(run.parent / "quickstart-2" / "checkpoints")
    write_checkpoint(store, TENSORS, step=16, final=True, ranks=5, run_id="quickstart-2")
    a, b = f"{run}/4k", f"{run.parent}/quickstart-2"
    same = checkpoints("diff", a, b)
    assert same.exit_code == 0 and "equal: nothing differs" in same.stdout, same.output
    write_checkpoint(store, TENSORS | {"norm.weight": np.full(20, 1.5)}, step=20)
    other = checkpoints("diff", a, b)
    assert other.exit_code == 1 and "step: 16 and 20" in other.stdout
    assert [line.split() for line in other.stdout.splitlines() if "norm.weight" in line] == [
        ["norm.weight", "param", "20", "20", "0.5", "0.333"],
        ["norm.weight", "exp_avg", "20", "20", "0.25", "0.333"],
        ["norm.weight", "exp_avg_sq", "20", "20", "1.25", "0.556"],
    ]
    quiet = checkpoints("diff", "--quiet", a, b)
    assert (quiet.exit_code, quiet.output) == (1, "")
    found = json.loads(checkpoints("diff", a, b, "--json").stdout)
    assert found["equal"] is False and found["values"]["step"] == [16, 20]
    damage(run, "4k/16")
    broken = checkpoints("diff", a, b)
    assert broken.exit_code == 2 and "the checksum of bytes 0 to" in broken.stderr


def test_copy_to_a_bucket(run: Path, s3_url: str) -> None:
    (run / "spec.yaml").write_text("name: quickstart\n")
    done = checkpoints("copy", f"{run}/4k/16", s3_url)
    assert done.exit_code == 0 and f"in {s3_url}/quickstart-1" in done.stdout, done.output
    there = f"{s3_url}/quickstart-1"
    listed = json.loads(checkpoints("list", there, "--json").stdout)["checkpoints"]
    assert [(c["stage"], c["step"]) for c in listed] == [("4k", 16)]
    assert open_store(there).get("spec.yaml") == b"name: quickstart\n"
    assert checkpoints("diff", "-q", f"{run}/4k", f"{there}/4k").exit_code == 0
    again = checkpoints("copy", f"{run}/4k/16", there)
    assert again.exit_code == 0 and "0 B copied, 2 objects were there" in again.stdout
    itself = checkpoints("copy", str(run), str(run.parent))
    assert itself.exit_code == 2 and "is where it is already" in itself.stderr


def test_prune_shows_asks_and_keeps(run: Path) -> None:
    def steps() -> list[tuple[str, int]]:
        found = json.loads(checkpoints("list", str(run), "--json").stdout)
        return [(c["stage"], c["step"]) for c in found["checkpoints"]]

    before = steps()
    planned = checkpoints("prune", str(run), "--dry-run")
    assert planned.exit_code == 0
    assert [line.split()[0] for line in planned.stdout.splitlines()[1:]] == [
        f"00-4k/step-{step:08d}" for step in (4, 8, 12)
    ]
    asked = checkpoints("prune", str(run))
    assert asked.exit_code == 2 and "nobody is there to ask; add --yes" in asked.stderr
    assert checkpoints("prune", str(run), "--json").exit_code == 2
    hasty = checkpoints("prune", str(run), "--leftovers-older-than", "9min", "--yes")
    assert hasty.exit_code == 2 and "600s" in hasty.stderr
    assert steps() == before
    assert checkpoints("prune", str(run), "--keep", "3", "--yes").exit_code == 0
    assert steps() == [("4k", 12), ("4k", 16), ("8k", 4)]
    (left,) = (run / "checkpoints/01-8k/step-00000008").iterdir()
    os.utime(left, (0, time.time() - 3600))
    aged = ("prune", str(run), "--keep", "1", "--leftovers-older-than", "30min")
    assert "01-8k/step-00000008  a save" in checkpoints(*aged, "-n").stdout and left.exists()
    assert "2 removed" in checkpoints(*aged, "--yes").stdout and not left.exists()
    # The newest two stay whatever is asked; they hold the end of a stage here.
    assert checkpoints("prune", str(run), "--keep", "1", "--stage-ends", "-y").exit_code == 0
    assert steps() == [("4k", 16), ("8k", 4)]
    assert checkpoints("prune", f"{run}/4k").exit_code == 2


def test_a_store_that_is_away_is_one_line(
    monkeypatch: pytest.MonkeyPatch, s3_url: str, run: Path
) -> None:
    missing = checkpoints("list", "s3://no-such-bucket/runs/quickstart-1")
    assert missing.exit_code == 1
    assert missing.stderr.startswith("error: ") and "no-such-bucket" in missing.stderr
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for command in ("list", "show", "verify"):
        refused = checkpoints(command, f"{s3_url}/quickstart-1")
        assert refused.exit_code == (2 if command == "verify" else 1), refused.output
        assert len(refused.stderr.strip().splitlines()) == 1 and "wrong" not in refused.stderr
    assert checkpoints("copy", str(run), s3_url).exit_code == 1
    assert checkpoints("list", "ftp://host/runs").exit_code == 2  # no store of that kind exists


def test_weights_go_from_a_bucket_to_a_bucket(
    s3_url: str, tmp_path: Path, write_checkpoint: Callable[..., Any]
) -> None:
    """The run's folder is on another machine; transformers computes what the model did."""
    transformers = pytest.importorskip("transformers")
    import torch

    from ringworld_model.transformer import WorldModel, init_weights

    spec = exported_spec()
    model = WorldModel(spec.model.config(), rope_theta=1e5)
    init_weights(model, 3)
    store = open_store(f"{s3_url}/quickstart-1/checkpoints")
    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    write_checkpoint(store, tensors, ranks=3)
    weights = f"{s3_url}/weights"
    unknown = ringworld("export", f"{s3_url}/quickstart-1", "--to", weights)
    assert unknown.exit_code == 2 and "has no spec.yaml" in unknown.stderr
    open_store(f"{s3_url}/quickstart-1").put("spec.yaml", [resolved_yaml(spec).encode()])

    done = ringworld("export", f"{s3_url}/quickstart/4k", "--to", weights, "--max-shard", "20Ki")
    assert done.exit_code == 0, done.output
    assert "no tokenizer" in done.stdout and "--tokenizer" in done.stdout
    target = open_store(weights)
    folder = tmp_path / "weights"
    for info in target.list():
        path = folder / info.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(target.get(info.key))
    written = sorted(target.list(), key=lambda info: info.modified)
    assert len(written) > 4 and f"  {written[0].key}" in done.stdout.splitlines()
    tokens = torch.randint(0, 48, (2, 40), generator=torch.Generator().manual_seed(0))
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.text_logits(tokens)
        torch.testing.assert_close(llama(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 1e5

    again = ringworld("export", f"{s3_url}/quickstart-1", "--to", weights)
    assert again.exit_code == 1 and "is not empty: it holds" in again.stderr
    here = ringworld("export", f"{s3_url}/quickstart-1/4k/8", "--to", str(tmp_path / "here"))
    assert here.exit_code == 0, here.output
    same = WorldModel(spec.model.config(), rope_theta=1e5)
    from ringworld_model.hf import load_pretrained

    load_pretrained(same, tmp_path / "here")
    for name, parameter in same.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), tensors[name]), name


def exported_spec() -> JobSpec:
    model = {
        "preset": "tiny",
        "hidden_size": 32,
        "ffn_size": 44,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "text_vocab_size": 48,
        "vision": {"codebook_size": 16},
    }
    stage = {
        "name": "4k",
        "context_length": 4096,
        "rope_theta": 1e5,
        "steps": 8,
        "global_batch_tokens": 16384,
        "mixture": {"books": 1.0},
        "learning_rate": {"peak": 1e-3},
    }
    return JobSpec.model_validate(
        {
            "kind": "train",
            "name": "quickstart",
            "data": {"sources": {"books": {"shards": "/data/books"}}},
            "model": model,
            "stages": [stage],
        }
    )
