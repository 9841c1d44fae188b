"""model.init_from and model.rope_scaling: checked at submit, resolved in full, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from ringworld_jobs.load import JobSpecError, load_job
from ringworld_jobs.plan import model_config, plan_stages
from ringworld_jobs.resolve import resolved_yaml, spec_digest
from ringworld_model.config import PRESETS, preset
from ringworld_model.hf_config import config_json, own_json
from ringworld_model.hf_layout import parameter_shapes
from ringworld_model.lwm_layout import place_of

JOB = """
kind: train
name: warm
model: MODEL
data: {}
stages:
- {name: a, context_length: 1Ki, rope_theta: 1e6, steps: 1, global_batch_tokens: 1Ki,
   mixture: {x: 1}, learning_rate: {peak: 1e-3}}
"""

Write = Callable[..., Path]


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], Path]:
    def write(model: str) -> Path:
        path = tmp_path / "job.yaml"
        text = JOB.replace("MODEL", model).replace("data: {}", "data: {sources: {x: {shards: x}}}")
        path.write_text(text)
        return path

    (tmp_path / "x").mkdir()
    (tmp_path / "x/meta.json").write_text("{}")
    return write


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint's folder, as far as a job's check looks: config.json, and files by name."""

    def write(name: str = "llama", codes: int | None = None, **changes: Any) -> Path:
        config = preset("llama3.2-1b", vision_codebook_size=codes or 0)
        given = config_json(
            config,
            rope_theta=5e5,
            max_position_embeddings=131_072,
            dtype="bfloat16",
            bos_token_id=None,
            eos_token_id=None,
        )
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(given | changes))
        (path / "model.safetensors").touch()
        if codes is not None:
            (path / "ringworld").mkdir(exist_ok=True)
            (path / "ringworld/model.json").write_text(json.dumps(own_json(config)))
        return path

    return write


def problem(path: Path, **options: Any) -> str:
    with pytest.raises(JobSpecError) as caught:
        load_job(path, **options)
    assert len(caught.value.problems) == 1, str(caught.value)
    return str(caught.value)


def test_without_a_preset_the_folder_gives_the_shape(
    job: Callable[[str], Path], folder: Write, tmp_path: Path
) -> None:
    folder()
    spec = load_job(job("{init_from: hf:llama}"))
    assert spec.model.init_from == f"hf:{tmp_path / 'llama'}"
    assert spec.model.preset == "llama3.2-1b"
    assert model_config(spec) == PRESETS["llama3.2-1b"]
    # The recipe's tokenizer does not shrink a table that is there already.
    assert spec.model.config(text_vocab_size=512).text_vocab_size == 128_256
    assert plan_stages(spec)[0].num_parameters == PRESETS["llama3.2-1b"].num_parameters()
    # The resolved spec says all of it: it is loaded again without the folder.
    digest, again = spec_digest(spec), tmp_path / "resolved.yaml"
    again.write_text(resolved_yaml(spec))
    assert "rope_scaling:\n    factor: 32.0" in again.read_text()
    assert load_job(again) == spec
    (tmp_path / "llama").rename(tmp_path / "moved")
    assert load_job(again, check_files=False) == spec
    # Where the folder stands does not matter to what the spec means.
    (tmp_path / "other").mkdir()
    elsewhere = folder("other/llama")
    assert spec_digest(load_job(job(f"{{init_from: 'hf:{elsewhere}'}}"))) == digest

    changed = "{init_from: hf:other/llama, vision: {codebook_size: 0}, rope_scaling: none}"
    expected = replace(PRESETS["llama3.2-1b"], vision_codebook_size=0, rope_scaling=None)
    assert model_config(load_job(job(changed))) == expected


def test_a_shape_like_no_preset_and_our_own_vision_tables(
    job: Callable[[str], Path], folder: Write
) -> None:
    folder("small", codes=512, num_hidden_layers=3, vocab_size=777)
    config = model_config(load_job(job("{init_from: hf:small, rope_form: interleaved}")))
    assert (config.num_layers, config.text_vocab_size) == (3, 777)
    assert config.vision_codebook_size == 512
    assert config.rope_form == "interleaved"
    assert "vision.codebook_size is 512 there and 64 here" in problem(
        job("{init_from: hf:small, vision: {codebook_size: 64}}")
    )
    text = model_config(load_job(job("{init_from: hf:small, vision: {codebook_size: 0}}")))
    assert text.vision_codebook_size == 0


def test_a_preset_must_be_the_folders(job: Callable[[str], Path], folder: Write) -> None:
    folder()
    config = model_config(load_job(job("{preset: llama3.2-1b, init_from: hf:llama}")))
    assert config == PRESETS["llama3.2-1b"]
    said = problem(job("{preset: llama3-8b, init_from: hf:llama}"))
    assert re.search(
        r"job\.yaml:4: model\.init_from = 'hf:llama': .*llama holds another model", said
    )
    for part in (
        "hidden_size is 2048 there and 4096 here",
        "tie_text_embeddings is True there and False here",
        "rope_scaling is RopeScaling(factor=32.0",
        "leave preset out",
    ):
        assert part in said
    assert "text_vocab_size" not in said
    # The same tensors computed another way: only where the spec says so.
    folder("eps", rms_norm_eps=1e-6)
    assert "norm_eps is 1e-06 there and 1e-05 here" in problem(
        job("{preset: llama3.2-1b, init_from: hf:eps}")
    )
    chosen = load_job(job("{preset: llama3.2-1b, norm_eps: 1e-5, init_from: hf:eps}"))
    assert model_config(chosen).norm_eps == 1e-5
    assert "num_layers is 16 there and 4 here; leave these fields out" in problem(
        job("{init_from: hf:llama, num_layers: 4}")
    )


@pytest.mark.parametrize(
    ("init_from", "message"),
    [
        ("/models/llama", "expected hf:PATH for a Llama-family checkpoint"),
        ("hg:llama", "expected hf:PATH.*did you mean hf:"),
        ("hf:", "expected hf:PATH"),
        ("hf:lama", "lama: no such folder.*holds llama"),
        ("hf:empty", "empty: it holds no config.json"),
        ("hf:bias", r"config.json: attention_bias=True \(only False is read\)"),
        ("hf:no-weights", "holds neither model.safetensors nor pytorch_model.bin"),
        ("lwm:llama", "write model.preset too, such as 7b"),
    ],
)
def test_what_cannot_be_loaded_is_said_at_submit(
    init_from: str, message: str, job: Callable[[str], Path], folder: Write, tmp_path: Path
) -> None:
    folder()
    folder("bias", attention_bias=True)
    (folder("no-weights") / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    said = problem(job(f"{{init_from: '{init_from}'}}"))
    assert re.search(rf"job\.yaml:4: model\.init_from = .*{message}", said), said


def test_a_job_plans_without_the_weights_where_it_names_a_preset(
    job: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = load_job(job("{preset: llama2-7b, init_from: hf:absent}"), check_files=False)
    assert spec.model.init_from == f"hf:{tmp_path / 'absent'}"
    assert model_config(spec) == PRESETS["llama2-7b"]
    assert "no such folder" in problem(job("{init_from: hf:absent}"), check_files=False)


def write_lwm(path: Path, changes: dict[str, tuple[int, ...]]) -> None:
    """Arrays of nothing but the right number of bytes."""
    config = preset("debug")
    with path.open("wb") as file:
        for name, shape in (parameter_shapes(config) | changes).items():
            place = place_of(name, stacked=False)
            stored = shape[::-1] if place.turned else shape
            data = bytes(4 * stored[0] * (stored[1] if len(stored) > 1 else 1))
            array = msgpack.packb((stored, "float32", data))
            file.write(msgpack.packb((place.key, msgpack.packb(msgpack.ExtType(1, array)))))


def test_a_file_of_lwm_is_held_against_the_preset(
    job: Callable[[str], Path], tmp_path: Path
) -> None:
    write_lwm(tmp_path / "params", {})
    spec = load_job(job("{preset: debug, init_from: lwm:params}"))
    assert spec.model.init_from == f"lwm:{tmp_path / 'params'}"
    assert model_config(spec) == PRESETS["debug"]
    write_lwm(tmp_path / "params", {"layers.1.mlp.up_proj.weight": (250, 256)})
    assert "transformer/h/1/feed_forward/w3/kernel is [256, 250] and not [256, 256]" in problem(
        job("{preset: debug, init_from: lwm:params}")
    )
    write_lwm(
        tmp_path / "params", {"vision_embed.weight": (320, 256), "vision_head.weight": (320, 256)}
    )
    spec = load_job(job("{preset: debug, init_from: lwm:params}"))
    assert model_config(spec).vision_codebook_size == 64


def test_rope_scaling_in_a_spec(job: Callable[[str], Path]) -> None:
    full = "{factor: 8, low_freq_factor: 1, high_freq_factor: 4"
    full += ", original_max_position_embeddings: 8192}"
    config = model_config(load_job(job(f"{{preset: tiny, rope_scaling: {full}}}")))
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.rope_scaling.high_freq_factor) == (8.0, 4.0)
    assert model_config(load_job(job("{preset: llama3.2-1b}"))).rope_scaling is not None
    assert (
        model_config(load_job(job("{preset: llama3.2-1b, rope_scaling: none}"))).rope_scaling
        is None
    )
    said = problem(
        job(f"{{rope_scaling: {full.replace('low_freq_factor: 1', 'low_freq_factor: 5')}}}")
    )
    assert "low_freq_factor 5 is not below high_freq_factor 4" in said
    assert "none" in problem(job("{rope_scaling: yarn}"))
    with pytest.raises(JobSpecError, match=r"model\.rope_scaling\.high_freq_factor: missing"):
        load_job(job("{rope_scaling: {factor: 8, low_freq_factor: 1}}"))
