"""Each mistake gets its line, its path and the remedy; the table is the promise."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ringworld_jobs.document import read_document
from ringworld_jobs.load import JobSpecError, Problem, load_job

# Line 1 is `kind`. Every case replaces some text of this valid file.
VALID = """\
kind: train
name: walk
seed: 1
model: {preset: tiny}
data: {recipe: recipe.yaml}
optimizer: {betas: [0.9, 0.95]}
resources: {workers: {min: 1, max: 4}}
checkpoint: {store: "file://runs", every: 20 steps}
tracking: {mlflow: off}
recovery: {stall_timeout: 300s}
defaults:
  learning_rate: {peak: 1e-3}
  zero_stage: 1
stages:
- name: short
  context_length: 1Ki
  rope_theta: 1e4
  steps: 10
  global_batch_tokens: 4Ki
  mesh: {sequence_parallel: 1}
  mixture: {books: 0.2, clips: 0.8}
- name: long
  context_length: 4Ki
  rope_theta: 1e6
  tokens: 40Ki
  global_batch_tokens: 8Ki
  mesh: {sequence_parallel: 2, data_parallel: 2}
  mixture: {books: 1}
"""

RECIPE = """\
kind: data
name: tiny
tokenizer: {train: {vocabulary_size: 400}}
codebook: {codebook_size: 128, frame_size: 16, patch_size: 4}
videos: {band: {path: band.mp4}}
datasets:
  books: {kind: text, files: ["*.txt"]}
  clips: {kind: video_text, videos: [band], frames_per_clip: 40}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "book.txt").write_text("Once upon a time.")
    (tmp_path / "band.mp4").write_bytes(b"not decoded here")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems_of(folder: Path, text: str | bytes) -> tuple[Problem, ...]:
    path = folder / "walk.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(JobSpecError) as caught:
        load_job(path)
    assert "pydantic" not in str(caught.value)
    return caught.value.problems


@dataclass(frozen=True)
class Case:
    old: str
    new: str
    line: int
    path: str
    words: tuple[str, ...]
    hint: str = ""


CASES = [
    Case("seed: 1", "sed: 1", 3, "sed", ("unknown key at the top level",), "seed"),
    Case("seed: 1", "seed: one", 3, "seed", ("expected a whole number",)),
    Case("seed: 1", "seed: true", 3, "seed", ("expected a whole number",)),
    Case("seed: 1", "zero_stage: 3", 3, "zero_stage", ("belongs in stages[] or defaults",)),
    Case("seed: 1", "peak: 1", 3, "peak", ("belongs in stages[].learning_rate or defaults.lea",)),
    Case("seed: 1", "name: run", 3, "name", ("given twice", "first on line 2")),
    Case("kind: train", "kind: tran", 1, "kind", ("expected train",)),
    Case("kind: train", "kind: data", 1, "kind", ("data recipe", "`ringworld data build`")),
    Case("name: walk", "name: My Walk", 2, "name", ("a-z, 0-9",), "my-walk"),
    Case("name: walk", "name: 2024", 2, "name", ("a-z", "quotes")),
    Case("name: walk", "name:", 2, "name", ("expected",)),
    Case("tiny}", "tny}", 4, "model.preset", ("no such preset", "llama2-7b"), "tiny"),
    Case("tiny}", "tiny, num_heads: 3}", 4, "model.hidden_size", ("not divisible", "3")),
    Case("tiny}", "tiny, num_heads: 0}", 4, "model.num_heads", ("at least 1",)),
    Case("tiny}", "tiny, text_vocab_size: 300}", 4, "model.text_vocab_size", ("400 pieces",)),
    Case(
        "tiny}",
        "tiny, vision: {codebook_size: 0}}",
        4,
        "model.vision.codebook_size",
        ("without vision", "clips", "stage short"),
    ),
    Case("recipe.yaml", "recipes.yaml", 5, "data.recipe", ("no such file", "holds recipe.yaml")),
    Case("0.95]", "1.95]", 6, "optimizer.betas[1]", ("at least 0 and below 1",)),
    Case("0.95]", "0.95, 1]", 6, "optimizer.betas", ("a list of 2 numbers",)),
    Case("min: 1", "min: 5", 7, "resources.workers", ("min 5 is above max 4", "raise max")),
    Case(
        "max: 4",
        "max: 4, cpus: 2",
        7,
        "resources.workers.cpus",
        ("is it cpus_per_worker, which belongs in resources?",),
    ),
    Case("file://runs", "s3a://runs/x", 8, "checkpoint.store", ("file://PATH", "mean s3://?")),
    Case("file://runs", "https://h/runs", 8, "checkpoint.store", ("AWS_ENDPOINT_URL_S3",)),
    Case("file://runs", "s3:runs/x", 8, "checkpoint.store", ("write s3://runs/x",)),
    Case("file://runs", "s3://", 8, "checkpoint.store", ("needs a bucket",)),
    Case("file://runs", "s3://My_Runs/x", 8, "checkpoint.store", ("3 to 63", "mean my-runs?")),
    Case("file://runs", "s3://10.0.0.1/x", 8, "checkpoint.store", ("no IP address",)),
    Case("file://runs", "s3://runs/a/../b", 8, "checkpoint.store", ("a part '..'",)),
    Case("file://runs", "s3://runs//a", 8, "checkpoint.store", ("a part ''",)),
    Case("file://runs", "s3://runs/a%2Fb", 8, "checkpoint.store", ("neither %",)),
    Case("file://runs", "s3://runs/x?endpoint=h", 8, "checkpoint.store", ("AWS_ENDPOINT_URL_S3",)),
    Case("every: 20", "max_host_bytes: 1Mi, every: 20", 8, "checkpoint.max_host_bytes", ("16Mi",)),
    Case(
        "every: 20",
        "abort_unfinished_after: 9min, every: 20",
        8,
        "checkpoint.abort_unfinished_after",
        ("540s", "600s"),
    ),
    Case("tiny}", "tiny, init_from: 'run:'}", 4, "model.init_from", ("run:PLACE",)),
    Case("tiny}", "tiny, init_from: 'run:a/b/c'}", 4, "model.init_from", ("'c' is no step",)),
    Case("tiny}", "tiny, init_from: 'run:/a'}", 4, "model.init_from", ("RUN[/STAGE[/STEP]]",)),
    Case("tiny}", "tiny, init_from: 'run:s3a://a/b'}", 4, "model.init_from", ("mean s3://?",)),
    Case("tiny}", "tiny, init_from: 'runs:a'}", 4, "model.init_from", ("run:PLACE",), "run:"),
    Case(
        "steps: 10",
        "steps: 10\n  optimizer_state: inherit",
        19,
        "stages[0].optimizer_state",
        ("names no run", "run:RUN"),
    ),
    Case("file://runs", "runs", 8, "checkpoint.store", ("write file://runs",)),
    Case("file://runs", "file://book.txt/x", 8, "checkpoint.store", ("is a file",)),
    Case("every: 20 steps", "every: 20", 8, "checkpoint.every", ("15min", "20 steps")),
    Case("every: 20 steps", "every: 0 steps", 8, "checkpoint.every", ("never due",)),
    Case("mlflow: off", "mlflow: false", 9, "tracking.mlflow", ("expected text", "quotes")),
    Case("300s", "300", 10, "recovery.stall_timeout", ("90s or 15min, or auto",)),
    Case(
        "zero_stage: 1", "parity: {layer: 1}", 13, "defaults.parity.layer", ("unknown",), "layers"
    ),
    Case("zero_stage: 1", "parity: {rows: 0}", 13, "defaults.parity.rows", ("at least 1",)),
    Case("zero_stage: 1", "parity: 3", 13, "defaults.parity", ("true or false, or a mapping of",)),
    Case(
        "zero_stage: 1",
        "parity: {context_length: 4K}",
        13,
        "defaults.parity.context_length",
        ("4Ki",),
    ),
    Case("peak: 1e-3", "peak: -1", 12, "defaults.learning_rate.peak", ("a number above 0",)),
    Case("peak: 1e-3", "peak: .nan", 12, "defaults.learning_rate.peak", ("finite",)),
    Case("peak: 1e-3", "peek: 1e-3", 12, "defaults.learning_rate.peek", ("unknown",), "peak"),
    Case(
        "{peak: 1e-3}",
        "{peak: 1e-3, final: 1e-2, schedule: cosine}",
        12,
        "defaults.learning_rate.final",
        ("falls from peak 0.001",),
    ),
    Case(
        "{peak: 1e-3}",
        "{peak: 1e-3, final: 1e-4}",
        12,
        "defaults.learning_rate.final",
        ("never comes to final", "schedule: cosine"),
    ),
    Case(
        "tokens: 40Ki",
        "tokens: 40Ki\n  learning_rate: {warmup_steps: 9}",
        26,
        "stages[1].learning_rate.warmup_steps",
        ("stage long has only 5 steps",),
    ),
    Case("file://runs", "file:///proc/runs", 8, "checkpoint.store", ("cannot write in /proc",)),
    Case("mlflow: off", "mlflow: htp://x", 9, "tracking.mlflow", ("no such scheme",), "http://"),
    Case("mlflow: off", "mlflow: offf", 9, "tracking.mlflow", ("its scheme",), "off"),
    Case("peak: 1e-3", "warmup_steps: 1", 12, "defaults.learning_rate.peak", ("missing", "above")),
    Case("zero_stage: 1", "zero_stage: 4", 13, "defaults.zero_stage", ("0, 1, 2 or 3",)),
    Case("zero_stage: 1", "precision: b16", 13, "defaults.precision", ("fp32 or bf16",), "bf16"),
    Case(
        "zero_stage: 1",
        "precision: bf16\n  zero_stage: 0",
        14,
        "defaults.zero_stage",
        ("bf16", "zero_stage 1"),
    ),
    Case(
        "zero_stage: 1",
        "memory: {activation_offload: true}",
        13,
        "defaults.memory.activation_offload",
        ("activation_checkpointing: full (or attention_saved)",),
    ),
    Case(
        "zero_stage: 1",
        "memory: {optimizer_offload: true}\n  zero_stage: 0",
        13,
        "defaults.memory.optimizer_offload",
        ("zero_stage is 0", "write zero_stage: 1"),
    ),
    Case(
        "zero_stage: 1",
        "memory: {parameter_offload: true}\n  zero_stage: 2",
        13,
        "defaults.memory.parameter_offload",
        ("zero_stage is 2", "write zero_stage: 3"),
    ),
    Case(
        "zero_stage: 1",
        "memory: {mlp_tile_tokens: 8}",
        13,
        "defaults.memory.mlp_tile_tokens",
        ("at least 16",),
    ),
    Case(
        "context_length: 1Ki",
        "memory: {mlp_tile_tokens: 16}\n  context_length: 1Mi",
        16,
        "stages[0].memory.mlp_tile_tokens",
        ("1,048,576 tokens of a worker", "1,024 tiles", "write 1024 or more"),
    ),
    Case("1Ki", "1K", 16, "stages[0].context_length", ("decimal", "did you mean 1Ki")),
    Case("1Ki", "1000", 16, "stages[0].context_length", ("decimal", "did you mean 1Ki")),
    Case("1Ki", "8", 16, "stages[0].context_length", ("at least 16",)),
    Case("  context_length: 1Ki", "  pad: 1", 16, "stages[0].pad", ("unknown key", "it takes")),
    Case("rope_theta: 1e4", "rope_theta: x", 17, "stages[0].rope_theta", ("a number above 0",)),
    Case("steps: 10", "steps: 10.5", 18, "stages[0].steps", ("whole number of at least 1",)),
    Case("steps: 10", "validation_rows: 1", 15, "stages[0]", ("steps or tokens", "neither")),
    Case("tokens: 40Ki", "tokens: 40Qi", 25, "stages[1].tokens", ("Ki Mi Gi Ti", "K M B T")),
    Case(
        "global_batch_tokens: 8Ki",
        "global_batch_tokens: 9000",
        26,
        "stages[1].global_batch_tokens",
        ("9,000", "8Ki or 12Ki"),
    ),
    Case(
        "global_batch_tokens: 8Ki",
        "global_batch_tokens: 12Ki",
        27,
        "stages[1].mesh.data_parallel",
        ("3 rows", "data_parallel 2", "8Ki or 16Ki"),
    ),
    Case(
        "mesh: {sequence_parallel: 1}",
        "micro_batch_size: 3",
        20,
        "stages[0].micro_batch_size",
        ("4 rows", "3Ki or 6Ki"),
    ),
    Case(
        "{sequence_parallel: 2, data_parallel: 2}",
        "{sequence_parallel: 4, data_parallel: 2}",
        27,
        "stages[1].mesh.sequence_parallel",
        ("= 8 workers", "resources.workers.max is 4", "raise it to 8"),
    ),
    Case(
        "sequence_parallel: 1",
        "sequence_parallel: atuo",
        20,
        "stages[0].mesh.sequence_parallel",
        ("a whole number of at least 1, auto or a mapping of ring, heads",),
        "auto",
    ),
    Case(
        "sequence_parallel: 1",
        "sequence_parallel: {ring: 2, head: 2}",
        20,
        "stages[0].mesh.sequence_parallel.head",
        ("unknown key",),
        "heads",
    ),
    Case(
        "sequence_parallel: 1",
        "sequence_parallel: {ring: two, heads: 2}",
        20,
        "stages[0].mesh.sequence_parallel.ring",
        ("a whole number of at least 1",),
    ),
    Case(
        "sequence_parallel: 1",
        "sequence_parallel: {ring: 1, heads: 4}",
        20,
        "stages[0].mesh.sequence_parallel.heads",
        ("4 workers cannot split 2 query heads and 2 key heads", "one of 1, 2"),
    ),
    Case(
        "sequence_parallel: 1",
        "sequence_parallel: {ring: 3, heads: 2}",
        20,
        "stages[0].mesh.sequence_parallel",
        ("ring 3 x heads 2 x data_parallel 1 = 6", "raise it to 6"),
    ),
    Case("books: 0.2", "boks: 0.2", 21, "stages[0].mixture.boks", ("books, clips",), "books"),
    Case("books: 0.2", "books: -1", 21, "stages[0].mixture.books", ("above 0",)),
    Case("{books: 1}", "{}", 28, "stages[1].mixture", ("empty",)),
    Case("{books: 1}", "[books]", 28, "stages[1].mixture", ("a mapping of names", "got a list")),
    Case("name: long", "name: short", 22, "stages[1].name", ("stages[0]", "unique")),
    Case("1Ki", "512", 21, "stages[0].mixture.clips", ("696 tokens", "stage short", "to 1Ki")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path}-{case.new[:24]}")
def test_one_mistake_gives_one_problem_at_its_place(case: Case, folder: Path) -> None:
    assert case.old in VALID
    text = VALID.replace(case.old, case.new, 1)
    found = [p for p in problems_of(folder, text) if p.path == case.path]
    assert len(found) == 1, [str(p) for p in problems_of(folder, text)]
    problem = found[0]
    assert problem.line == case.line
    assert problem.hint == case.hint
    for word in case.words:
        assert word in problem.message
    assert str(problem).startswith(f"{folder / 'walk.yaml'}:{case.line}: {case.path}")


def test_the_file_without_mistakes_loads(folder: Path) -> None:
    (folder / "walk.yaml").write_text(VALID)
    spec = load_job(folder / "walk.yaml")
    assert spec.tracking.mlflow == "off"
    assert [stage.learning_rate.peak for stage in spec.stages] == [1e-3, 1e-3]
    assert [stage.num_steps for stage in spec.stages] == [10, 5]


def test_every_mistake_is_reported_at_once(folder: Path) -> None:
    """Schema errors do not hide the cross-field errors of what is sound."""
    text = VALID
    for old, new in {
        "seed: 1": "seeds: 1",
        "tiny}": "tny}",
        "file://runs": "s3://x",
        "peak: 1e-3": "peak: 0",
        "context_length: 1Ki": "context_length: 1K",
        "books: 0.2": "boks: 0.2",
        "tokens: 40Ki": "tokens: 40Ki\n  steps: 3",
        "global_batch_tokens: 8Ki": "global_batch_tokens: 9000",
        "name: long": "name: short",
    }.items():
        text = text.replace(old, new, 1)
    paths = [problem.path for problem in problems_of(folder, text)]
    assert sorted(paths) == sorted(
        [
            "seeds",
            "model.preset",
            "checkpoint.store",
            "defaults.learning_rate.peak",
            "stages[0].context_length",
            "stages[0].mixture.boks",
            "stages[1]",
            "stages[1].global_batch_tokens",
            "stages[1].name",
        ]
    )


def test_a_wrong_share_does_not_hide_the_unknown_names_beside_it(folder: Path) -> None:
    found = problems_of(folder, VALID.replace("books: 0.2, clips: 0.8", "boks: 1, clips: 0"))
    assert [(p.path, p.hint) for p in found] == [
        ("stages[0].mixture.boks", "books"),
        ("stages[0].mixture.clips", ""),
    ]


def test_a_stage_may_keep_its_rate_where_defaults_have_a_cosine(folder: Path) -> None:
    text = VALID.replace("{peak: 1e-3}", "{peak: 1e-3, final: 1e-4, schedule: cosine}").replace(
        "tokens: 40Ki", "tokens: 40Ki\n  learning_rate: {schedule: constant}"
    )
    (folder / "walk.yaml").write_text(text)
    assert load_job(folder / "walk.yaml").stages[1].learning_rate.schedule == "constant"


def test_a_mistake_in_defaults_is_reported_once_at_its_own_line(folder: Path) -> None:
    (problem,) = problems_of(folder, VALID.replace("zero_stage: 1", "zero_stag: 1"))
    assert (problem.line, problem.path, problem.hint) == (13, "defaults.zero_stag", "zero_stage")


def test_defaults_are_checked_even_without_a_stage(folder: Path) -> None:
    text = VALID[: VALID.index("stages:")].replace("zero_stage", "zero_stag")
    assert [p.path for p in problems_of(folder, text)] == ["stages", "defaults.zero_stag"]


def test_the_recipe_reports_its_own_lines(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("band]", "bend]").replace("name:", "nam:"))
    found = problems_of(folder, VALID)
    assert {(Path(p.file).name, p.line, p.path) for p in found} == {
        ("recipe.yaml", 1, "name"),
        ("recipe.yaml", 2, "nam"),
        ("recipe.yaml", 8, "datasets.clips.videos[0]"),
    }


def test_the_error_survives_pickling(folder: Path) -> None:
    found = problems_of(folder, VALID.replace("seed", "sed"))
    again = pickle.loads(pickle.dumps(JobSpecError(found)))
    assert again.problems == found and str(again) == str(JobSpecError(found))


ODD_VALUES = [
    "",
    "~",
    "true",
    "-1",
    "0",
    "1e400",
    ".nan",
    "x",
    "'1'",
    "[]",
    "[1, a]",
    "{}",
    "{x: {y: 1}}",
]


def places_of(node: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [path] if path else []
    items = (
        node.items() if isinstance(node, dict) else enumerate(node if type(node) is list else [])
    )
    return found + [place for key, value in items for place in places_of(value, (*path, key))]


@pytest.mark.parametrize("odd", ODD_VALUES)
def test_any_odd_value_anywhere_is_accepted_or_explained(folder: Path, odd: str) -> None:
    """Whatever stands at a place, the answer is a spec or problems with lines, never a crash."""
    (folder / "walk.yaml").write_text(VALID)
    data = read_document(folder / "walk.yaml").data
    value = read_value(folder, odd)
    for place in places_of(data):
        changed = copy.deepcopy(data)
        target = changed
        for part in place[:-1]:
            target = target[part]
        target[place[-1]] = value
        (folder / "odd.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
        try:
            load_job(folder / "odd.yaml")
        except JobSpecError as error:
            assert error.problems
            for problem in error.problems:
                assert problem.line > 0 and problem.message
                for word in (
                    "pydantic",
                    "Input should",
                    "Extra inputs",
                    "validation error",
                    "type=",
                ):
                    assert word not in str(problem), str(problem)


def read_value(folder: Path, text: str) -> object:
    (folder / "value.yaml").write_text(f"v: {text}")
    return read_document(folder / "value.yaml").data["v"]
