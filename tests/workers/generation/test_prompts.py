"""Prompts: what training writes, with media where they are meant; and what cannot be asked."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ringworld_model.batch import TEXT, VISION
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.sampling.settings import SamplingSettings
from ringworld_model.tokens import frames_of
from ringworld_workers.data.chat_template import Turn
from ringworld_workers.generation.asks import clip_ask, text_ask
from ringworld_workers.generation.coder import Coder, load_coder
from ringworld_workers.generation.conversation import opening_prompt
from ringworld_workers.generation.prompts import (
    Clip,
    Image,
    chat_prompt,
    codes_of,
    prompt_of,
    spans_of,
)
from ringworld_workers.generation.source import ModelSource, RequestError

SETTINGS = SamplingSettings()


def text_of(prompt: Prompt, coder: Coder) -> str:
    return coder.tokenizer.decode(prompt.ids(TEXT))


def test_a_bare_prompt_keeps_the_order(coder: Coder, picture: Path) -> None:
    behind = prompt_of(["What is ", "this?", Image(picture)], coder)
    before = prompt_of([Image(picture), "What is this?"], coder)
    assert text_of(behind, coder) == "What is this?<vision></vision>"
    assert text_of(before, coder) == "<vision></vision>What is this?"
    assert behind.tokens[0] == before.tokens[0] == coder.tokenizer.bos_id
    codes = frames_of(before.ids(VISION), 4, coder.grammar.codebook_size)
    assert np.array_equal(codes, codes_of(Image(picture), coder)) and len(codes) == 1
    # The centre square: red left, blue right.
    pixels = coder.pictures(codes)[0]
    assert (pixels[:, 0] == [255, 0, 0]).all() and (pixels[:, -1] == [0, 0, 255]).all()
    as_bytes = prompt_of([Image(picture.read_bytes()), "What is this?"], coder)
    assert np.array_equal(as_bytes.tokens, before.tokens)


def test_a_conversation_is_spelled_as_training_spells_it(coder: Coder, picture: Path) -> None:
    codes = codes_of(Image(picture), coder)
    turns = [
        Turn("user", ("What is this?", codes)),
        Turn("assistant", ("A flag.",)),
        Turn("user", ("Sure?",)),
    ]
    trained = Prompt.of(
        *spans_of(coder.template.parts([*turns, Turn("assistant", ("Yes.",))]), coder)
    )
    asked = chat_prompt(
        [
            {"role": "user", "content": ["What is this?", Image(picture)]},
            {"role": "assistant", "content": "A flag."},
            {"role": "user", "content": "Sure?"},
        ],
        coder,
    )
    assert text_of(asked, coder).endswith("A flag.USER: Sure? ASSISTANT:")
    assert np.array_equal(asked.tokens, trained.tokens[: len(asked)])
    assert len(trained) == len(asked) + len(coder.tokenizer.encode(" Yes.")) + 1


def test_what_a_conversation_is_about_is_spelled_as_a_question_would_be(
    coder: Coder, picture: Path
) -> None:
    for about in (["A story.", Image(picture)], [Image(picture), "A story."], [Image(picture)] * 2):
        whole = chat_prompt([{"role": "user", "content": [*about, "Who?"]}], coder)
        opening = opening_prompt(about, coder)
        assert np.array_equal(opening.tokens, whole.tokens[: len(opening)])
        assert text_of(whole, coder).removeprefix(text_of(opening, coder)) == " Who? ASSISTANT:"


def test_frames_by_rate_and_evenly(coder: Coder, film: Path) -> None:
    assert len(codes_of(Clip(film, fps=4), coder)) == 8
    assert len(codes_of(Clip(film, fps=4, num_frames=3), coder)) == 3
    assert len(codes_of(Clip(film), coder)) == 8
    spread = coder.pictures(codes_of(Clip(film, num_frames=3), coder)).mean((1, 2, 3))
    assert spread[0] < 20 and spread[-1] > 235 and 90 < spread[1] < 160


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "nothing is asked"),
        ([{"role": "assistant", "content": "x"}], "expected 'user'"),
        ([{"role": "robot", "content": "x"}], "role 'robot', expected one of system"),
        ([{"role": "user", "content": " "}], "is empty"),
        ([{"role": "user", "content": 5}], "a part of type int"),
    ],
)
def test_conversations_that_are_none(
    messages: list[dict[str, object]], why: str, coder: Coder
) -> None:
    with pytest.raises(RequestError, match=why):
        chat_prompt(messages, coder)


def test_media_that_cannot_be_used(coder: Coder, film: Path, tmp_path: Path) -> None:
    broken = tmp_path / "half.mp4"
    broken.write_bytes(film.read_bytes()[:900])
    for medium, why in [
        (Image(tmp_path / "none.png"), "image .*none.png: cannot be read: No such file"),
        (Clip(broken), "video .*half.mp4: "),
        (Clip(b"no film"), "the video: cannot be decoded at its start"),
        (Clip(film, fps=-1), "fps=-1: give a number above 0"),
    ]:
        with pytest.raises(RequestError, match=why):
            prompt_of([medium], coder)


def test_lengths_are_refused_before_there_are_weights(coder: Coder, film: Path) -> None:
    with pytest.raises(RequestError, match=r"prompt has 302 tokens, and .*trained for 256"):
        text_ask(["x" * 301], coder, SETTINGS, form="plain")
    with pytest.raises(RequestError, match=r"100 frames of 5 tokens take 509, .*; ask for 47"):
        clip_ask("x", 100, coder, SETTINGS, video=True, form="plain")
    with pytest.raises(RequestError, match="leaves room for none"):
        clip_ask("x" * 240, 2, coder, SETTINGS, video=True, form="plain")
    with pytest.raises(RequestError, match=r"is about has 336 tokens.*trained for 256"):
        opening_prompt(["word " * 60], coder)


def test_vocabularies_that_are_not_the_models(
    source: ModelSource, coder: Coder, tmp_path: Path
) -> None:
    other = tmp_path / "other.npz"
    codebook = coder.need_codebook("x")
    codebook.save(tmp_path)
    centroids = np.load(tmp_path / "codebook.npz")
    changed = {name: centroids[name] for name in centroids.files}
    changed["centroids"] = changed["centroids"][::-1]
    np.savez(other, **changed)
    cases = [
        (replace(source, codebook=str(other)), "is not the codebook that .* was trained with"),
        (replace(source, tokenizer_digest="0" * 64), "is not the tokenizer that"),
        (replace(source, tokenizer=""), "--tokenizer"),
        (replace(source, codebook=str(tmp_path / "none")), "the codebook cannot be read"),
        (
            replace(source, config=replace(source.config, vision_codebook_size=32)),
            "has 16 codes and .* was built for 32",
        ),
    ]
    for given, why in cases:
        with pytest.raises(RequestError, match=why):
            load_coder(given)


def test_without_its_codebook_a_model_draws_and_sees_nothing(
    source: ModelSource, picture: Path
) -> None:
    blind = load_coder(replace(source, codebook="", codebook_about=None))
    assert blind.grammar.max_frames == 0
    with pytest.raises(RequestError, match=r"picture.png needs the codebook .* --codebook"):
        prompt_of([Image(picture)], blind)
    text = replace(source, config=replace(source.config, vision_codebook_size=0))
    with pytest.raises(RequestError, match="needs a model with vision"):
        clip_ask("x", 1, load_coder(text), SETTINGS, video=False)


def test_bytes_that_are_read_leave_nothing_to_a_kill(
    coder: Coder, picture: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held: list[list[Path]] = []
    given = codes_of(Clip(film.read_bytes()), coder, lambda: held.append(list(tmp_path.iterdir())))
    assert np.array_equal(given, codes_of(Clip(film), coder)) and held and not any(held)
    image = codes_of(Image(picture.read_bytes()), coder)
    assert np.array_equal(image, codes_of(Image(picture), coder))


def test_a_film_that_nobody_waits_for_is_decoded_no_further(coder: Coder, film: Path) -> None:
    class Enough(Exception):
        pass

    pictures: list[None] = []

    def look() -> None:
        pictures.append(None)
        if len(pictures) == 5:
            raise Enough

    with pytest.raises(Enough):
        codes_of(Clip(film, num_frames=1), coder, look)
    assert len(pictures) == 5
