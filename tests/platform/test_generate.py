"""`ringworld generate` and `ringworld chat` as a person uses them, on a tiny model in a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from asked_folder import write_folder
from asked_model import make_subject
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from ringworld_jobs.resolve import resolved_yaml
from ringworld_jobs.spec import JobSpec
from ringworld_platform.cli import app
from ringworld_workers.generation.media_files import write_video
from ringworld_workers.store.opening import open_store

TEXT = ("--form", "plain", "--max-frames", "0", "--max-tokens", "6")


def ringworld(*arguments: str, lines: str | bytes | None = None) -> Result:
    environment = {"COLUMNS": "140", "TERM": "dumb"}
    return CliRunner().invoke(app, list(arguments), input=lines, env=environment)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("asked") / "tiny")


@pytest.fixture(scope="session")
def picture(model: Path) -> Path:
    path = model.parent / "picture.png"
    Image.new("RGB", (16, 24), "red").save(path)
    return path


@pytest.fixture(scope="session")
def film(model: Path) -> Path:
    path = model.parent / "film.mp4"
    write_video(np.full((8, 16, 16, 3), 90, np.uint8), path, 4)
    return path


def size_of(path: Path) -> tuple[int, float]:
    """Frames of a video, and frames a second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(stream)), float(stream.average_rate or 0)


def test_text_and_questions_about_media(model: Path, picture: Path, film: Path) -> None:
    said = ringworld("generate", str(model), "Once", *TEXT)
    assert said.exit_code == 0, said.output
    assert "tiny: 5 of 256 tokens" in said.stderr and "6 tokens" in said.stderr
    media = ("--image", str(picture), "--video", str(film), "--fps", "2")
    behind = ringworld("generate", str(model), "What?", *media, *TEXT)
    # 1 + 5 bytes, and two clips: 8 + 9 bytes of delimiters, one and four frames of 5 tokens.
    assert behind.exit_code == 0 and "tiny: 65 of 256 tokens" in behind.stderr, behind.output
    placed = ringworld("generate", str(model), "{video} or {image}?", *media, *TEXT)
    assert placed.exit_code == 0 and "tiny: 65 of 256" in placed.stderr, placed.output


def test_an_image_and_a_video_that_goes_on(model: Path, film: Path, tmp_path: Path) -> None:
    image, video = tmp_path / "a" / "red.png", tmp_path / "on.mp4"
    drawn = ringworld("generate", str(model), "red", "--to-image", str(image))
    assert drawn.exit_code == 0, drawn.output
    assert f"written to {image}" in drawn.stdout and Image.open(image).size == (8, 8)
    on = ("--to-video", str(video), "--from", str(film), "--frames", "3", "--fps", "2")
    done = ringworld("generate", str(model), "grey", *on)
    assert done.exit_code == 0, done.output
    # Two seconds of the film at two frames each, and three more.
    assert size_of(video) == (7, 2.0)


def test_a_file_of_prompts_goes_on_after_a_kill(model: Path, picture: Path, tmp_path: Path) -> None:
    prompts, answers = picture.with_name("many.jsonl"), tmp_path / "answers.jsonl"
    lines: list[dict[str, Any]] = [{"id": f"q{n}", "prompt": "word " * n} for n in range(1, 5)]
    prompts.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "?", "image": picture.name}])))
    command = ("generate", str(model), "--prompts", str(prompts), "--out", str(answers), *TEXT)
    whole = ringworld(*command, "--batch", "2", "--temperature", "1")
    assert whole.exit_code == 0, whole.output
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(r["id"] for r in records) == ["5", "q1", "q2", "q3", "q4"]
    assert all(r["tokens"] == 6 or r["end"] == "stop" for r in records)

    cut = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(cut[0] + cut[1] + cut[2][:10])
    rest = ringworld(*command, "--batch", "3", "--temperature", "1")
    assert rest.exit_code == 0 and "3 of 5 prompts to answer" in rest.stderr, rest.output
    again = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {r["id"]: r for r in again} == {r["id"]: r for r in records}

    other = ringworld(*command, "--temperature", "0.5")
    assert other.exit_code == 2 and "5 answers of other settings: text was" in other.stderr
    prompts.write_text(json.dumps({"id": "q1", "prompt": "another"}))
    changed = ringworld(*command, "--temperature", "1")
    assert changed.exit_code == 2 and "another question of id 'q1'" in changed.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "nothing is asked"),
        (("x" * 300,), "the prompt has 301 tokens, and"),
        (("x", "--image", "none.png"), "image none.png: cannot be read: No such file"),
        (("a\udcff",), "the text has no whole character at 1; give it in UTF-8"),
        (("{image}",), "has 1 places {image} and there are 0 images"),
        (("x", "--to-image", "a.bmp"), "a.bmp: an image is written as .png"),
        (("x", "--to-video", "a.mp4", "--frames", "80"), "80 frames of 5 tokens take 409"),
        (("x", "--from", "a.png"), "--from is what a --to-video begins with"),
        (
            ("x", "--to-image", "a.png", "--save", "d"),
            "--save is of answers in text, and --to-image",
        ),
        (("x", "--to-video", "a.mp4", "--max-tokens", "256"), "leave it out, or --to-video"),
        (("x", "--to-image", "a.png", "--max-frames", "2"), "--max-frames is of answers in text"),
        (("x", "--to-video", "a.mp4", "--stop", "."), "--stop is of answers in text"),
        (("x", "--to-image", "a.png", "--frames", "2"), "or take --to-video"),
        (("x", "--save", "d", "--max-frames", "0"), "--save keeps what an answer draws, and"),
        (("x", "--fps", "2"), "there is no --video to ask about"),
        (("x", "--batch", "2"), "--batch is of many questions, and there are no --prompts"),
        (("x", "--top-p", "2"), "top_p=2.0: give a number above 0 to 1"),
        (("x", "--codebook", "nowhere"), "--codebook nowhere: there is no such file"),
        (("x", "--prompts", "a.jsonl"), "--prompts and --out belong together"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    arguments: tuple[str, ...], why: str, model: Path, tmp_path: Path
) -> None:
    (model.parent / "unread").mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "ringworld"):
        link = model.parent / "unread" / name
        if not link.exists():
            link.symlink_to(model / name)
    result = ringworld("generate", str(model.parent / "unread"), *arguments, "--form", "plain")
    assert result.exit_code == 2, result.output
    assert why in " ".join(result.stderr.replace("│", " ").split())


def test_damaged_weights_are_one_line(model: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    (file,) = damaged.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, file, {"format": "pt"})
    said = ringworld("generate", str(damaged), "Once", *TEXT)
    assert said.exit_code == 1 and isinstance(said.exception, SystemExit), said.output
    assert "error: the largest logit is nan" in said.stderr


def test_a_chat_about_a_document(model: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("A short book. " * 6)
    lines = b"Wh\xff?\nWho?\n\n/undo\nWho?\n/nonsense\n/undo\n/undo\n/reset\n/help\n/quit\nnever\n"
    shown = ringworld(
        *("chat", str(model), "--document", str(book), "--max-tokens", "5"), lines=lines
    )
    assert shown.exit_code == 0, shown.output
    begun = 1 + len("You are a helpful assistant. USER: ") + 6 * 14 - 1
    assert f"a context of 256 tokens, {begun} of them given" in shown.stderr
    assert f"read {begun}/{begun} tokens" in shown.stderr
    assert "it was trained on no conversation" in shown.stderr
    assert "the text has no whole character at 2; give it in UTF-8" in shown.stderr
    assert shown.stderr.count("taken back") == 2 and "there is no question to take" in shown.stderr
    assert "/nonsense is no command" in shown.stderr
    assert f"[begun anew; {256 - begun} tokens left]" in shown.stderr
    assert shown.stderr.count("of 256 tokens left]") == 2
    book.write_text("word " * 80)
    long = ringworld("chat", str(model), "--document", str(book), lines="Who?\n")
    assert long.exit_code == 2 and "is about has 435 tokens, and" in long.stderr, long.stderr
    idle = ringworld("chat", str(model), "--save", str(tmp_path / "drawn"), lines="")
    assert idle.exit_code == 2 and "--max-frames 8" in idle.stderr, idle.stderr
    absent = ringworld("chat", str(model), "--document", str(tmp_path / "none"), lines="")
    assert absent.exit_code == 2 and "No such file" in absent.stderr


def test_a_runs_checkpoint_and_its_export_answer_alike(
    tmp_path: Path, write_checkpoint: Callable[..., Any]
) -> None:
    run, data = tmp_path / "runs" / "small-1", tmp_path / "data"
    loaded = make_subject(256).loaded
    tensors = {name: p.detach().numpy() for name, p in loaded.model.named_parameters()}
    write_checkpoint(open_store(f"file://{run}/checkpoints"), tensors, ranks=3, run_id="small-1")
    (run / "spec.yaml").write_text(resolved_yaml(_spec(loaded.source.config)))
    (data / "talks").mkdir(parents=True)
    loaded.tokenizer.save(data)
    assert loaded.codebook is not None
    loaded.codebook.save(data)
    meta = {
        "tokenizer": {"digest": loaded.tokenizer.digest()},
        "codebook": loaded.codebook.describe(),
    }
    words = {"system": "", "user_prefix": "Q:", "assistant_prefix": "A:"}
    (data / "meta.json").write_text(json.dumps(meta))
    (data / "talks" / "meta.json").write_text(json.dumps(meta | {"chat": words}))
    state = {"run_id": "small-1", "job": "small", "prepared": {"dir": str(data)}}
    (run / "state.json").write_text(json.dumps(state))

    ask = ("Who?", "--max-tokens", "8", "--max-frames", "0")
    answer = ringworld("generate", f"{run}/4k", *ask)
    assert answer.exit_code == 0, answer.output
    # bos, and "Q: Who? A:".
    assert "small-1/4k/8: 11 of 512 tokens" in answer.stderr
    exported = ringworld("export", str(run), "--to", str(tmp_path / "out"))
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "out/ringworld/codebook/codebook.npz").is_file()
    again = ringworld("generate", str(tmp_path / "out"), *ask)
    assert again.stdout == answer.stdout and "out: 11 of 512 tokens" in again.stderr
    lost = ringworld("generate", str(run / "5k"), *ask)
    assert lost.exit_code == 2 and "there are 4k" in lost.stderr
    data.rename(tmp_path / "moved")
    homeless = ringworld("generate", str(run), *ask)
    assert homeless.exit_code == 2 and "name it with --tokenizer" in homeless.stderr
    given = ("--tokenizer", str(tmp_path / "moved"), "--form", "plain")
    assert ringworld("generate", str(run), *ask, *given).exit_code == 0
    nothing = ringworld("generate", str(tmp_path / "moved"), *ask)
    assert nothing.exit_code == 2 and "A folder of weights holds config.json" in nothing.stderr


def test_ctrl_c_ends_a_chat_on_a_ring(model: Path, tmp_path: Path) -> None:
    code = "from ringworld_platform.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "chat", str(model), "--ring", "2", "--device", "cpu"],
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write("Who?\n")
        process.stdin.flush()
        said = ""
        while "tokens left]" not in said:
            said = process.stderr.readline()
            assert said, process.wait(10)
        children = psutil.Process(process.pid).children()
        ranks = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(ranks) == 1
        # Nor would a ring that is killed leave a file.
        assert not list(tmp_path.glob("ringworld-*"))
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive and not list(tmp_path.glob("ringworld-*"))


def _spec(config: Any) -> JobSpec:
    stage = {
        "name": "4k",
        "context_length": 512,
        "rope_theta": 1e4,
        "steps": 8,
        "global_batch_tokens": 512,
        "mixture": {"talks": 1.0},
        "learning_rate": {"peak": 1e-3},
    }
    sizes = ("hidden_size", "ffn_size", "num_layers", "num_heads", "num_kv_heads")
    shape = {name: getattr(config, name) for name in sizes}
    return JobSpec.model_validate(
        {
            "kind": "train",
            "name": "small",
            "model": {
                "preset": "tiny",
                "text_vocab_size": config.text_vocab_size,
                "vision": {"codebook_size": config.vision_codebook_size},
                **shape,
            },
            "data": {"recipe": "recipe.yaml"},
            "stages": [stage],
        }
    )
