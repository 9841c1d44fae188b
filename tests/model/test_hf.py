"""Weights in and out of Hugging Face's layout, against transformers itself."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ringworld_model import hf
from ringworld_model.config import ModelConfig, RopeScaling
from ringworld_model.hf import WeightsError, from_pretrained, load_pretrained, save_pretrained
from ringworld_model.hf_config import read_config
from ringworld_model.hf_layout import parameter_shapes
from ringworld_model.hf_save import write_pretrained
from ringworld_model.hf_sink import FolderSink
from ringworld_model.transformer import WorldModel, init_weights

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

TOKENS = torch.randint(0, 48, (2, 40), generator=torch.Generator().manual_seed(0))
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)


def tiny(**changes: Any) -> ModelConfig:
    shape = {
        "hidden_size": 32,
        "ffn_size": 44,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "text_vocab_size": 48,
        "vision_codebook_size": 0,
        "norm_eps": 1e-5,
        "init_std": 0.2,
    }
    return ModelConfig(**shape | changes)


FAMILIES = {
    "lwm": tiny(rope_form="interleaved", norm_eps=1e-6, vision_codebook_size=16),
    "llama2": tiny(vision_codebook_size=16),
    "llama3": tiny(num_kv_heads=2, vision_codebook_size=16, tie_vision_embeddings=True),
    "llama3.2": tiny(num_kv_heads=1, tie_text_embeddings=True, rope_scaling=SCALING),
    "wide heads": tiny(num_kv_heads=2, head_dim=12, rope_form="interleaved", rope_scaling=SCALING),
}


def make(config: ModelConfig, rope_theta: float = 5e4) -> WorldModel:
    model = WorldModel(config, rope_theta=rope_theta)
    init_weights(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += torch.linspace(-0.2, 0.3, parameter.numel())
    return model


def same(model: WorldModel, other: WorldModel) -> None:
    expected = dict(model.named_parameters())
    found = dict(other.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name]), name


def llama_logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Logits of what transformers loads, which must find every weight and no other."""
    llama, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="sdpa"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        return llama.eval()(tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", ["one", "many"])
def test_transformers_computes_what_was_saved(family: str, shards: str, tmp_path: Path) -> None:
    model = make(FAMILIES[family])
    folder = tmp_path / "out"
    limit = {"max_shard_bytes": 9_000} if shards == "many" else {}
    files = save_pretrained(model, folder, context_length=64, **limit)
    assert files[0] == folder / "config.json"
    assert all(file.is_file() for file in files)
    weights = [file for file in files if file.parent == folder and file.suffix == ".safetensors"]
    assert (len(weights) > 3) == (shards == "many")
    with torch.no_grad():
        expected = model.text_logits(TOKENS)
    assert expected.shape == (2, 40, 48)
    torch.testing.assert_close(llama_logits(folder), expected, rtol=1e-5, atol=1e-5)

    again = from_pretrained(folder)
    assert again.config == model.config
    assert again.rope_theta == model.rope_theta
    same(model, again)
    with torch.no_grad():
        assert torch.equal(again.text_logits(TOKENS), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_known_without_building_the_model(family: str) -> None:
    config = replace(FAMILIES[family], head_dim=20)
    with torch.device("meta"):
        model = WorldModel(config, rope_theta=1e4)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_shapes(config) == found


def random_llama(folder: Path, **changes: Any) -> Any:
    """Save a random Llama as transformers does."""
    shape = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    options = {name: changes.pop(name) for name in ("max_shard_size",) if name in changes}
    dtype = changes.pop("dtype", torch.float32)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    llama.eval().save_pretrained(folder, **options)
    return llama


LLAMAS = st.fixed_dictionaries(
    {
        "num_attention_heads": st.sampled_from([2, 4, 8]),
        "kv_share": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([None, 6, 16]),
        "intermediate_size": st.integers(8, 50),
        "num_hidden_layers": st.integers(1, 3),
        "vocab_size": st.integers(48, 70),
        "tie_word_embeddings": st.booleans(),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-5, 1e-2]),
        "rope_theta": st.sampled_from([1e4, 5e5, 5e7]),
        "scaled": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "max_shard_size": st.sampled_from(["5GB", "12KB"]),
        "interleaved": st.booleans(),
    }
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=LLAMAS)
def test_any_llama_computes_here_what_it_computes_there(
    drawn: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("llama") / "in"
    heads = drawn["num_attention_heads"]
    theta, interleaved = drawn.pop("rope_theta"), drawn.pop("interleaved")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if drawn.pop("scaled"):
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    drawn["num_key_value_heads"] = heads // drawn.pop("kv_share")
    torch.manual_seed(0)
    random_llama(folder, rope_parameters=rope, **drawn)
    # Loaded anew: a Llama made bf16 has its rotary table rounded too, one loaded as fp32 has not.
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = read_config(folder)
    assert found.rope_theta == theta
    config = found.config if not interleaved else replace(found.config, rope_form="interleaved")
    model = from_pretrained(folder, config=config)
    with torch.no_grad():
        logits = llama(TOKENS).logits
        torch.testing.assert_close(model.text_logits(TOKENS), logits, rtol=1e-5, atol=1e-5)

    back = folder.with_name("back")
    save_pretrained(model, back, dtype=drawn["dtype"], context_length=64)
    again = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    for name, tensor in llama.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for field in ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "head_dim"):
        assert getattr(again.config, field) == getattr(llama.config, field), field


def test_what_config_json_says_of_length_and_rope(tmp_path: Path) -> None:
    model = make(FAMILIES["llama3.2"])
    save_pretrained(
        model,
        tmp_path / "a",
        rope_theta=5e7,
        context_length=2**20,
        bos_token_id=3,
        eos_token_id=[4, 5],
    )
    written = json.loads((tmp_path / "a/config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    assert written["rope_theta"] == 5e7
    assert written["rope_scaling"] == scaling
    assert written["rope_parameters"] == {"rope_theta": 5e7, **scaling}
    assert written["max_position_embeddings"] == 2**20
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert config.rope_parameters == {"rope_theta": 5e7, **scaling}
    assert (config.bos_token_id, config.eos_token_id) == (3, [4, 5])
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "a")
    assert (generation.bos_token_id, generation.eos_token_id) == (3, [4, 5])
    assert read_config(tmp_path / "a").rope_theta == 5e7

    save_pretrained(make(tiny()), tmp_path / "b")
    plain = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    assert (plain.bos_token_id, plain.eos_token_id) == (None, None)
    assert plain.max_position_embeddings == 4096
    assert not (tmp_path / "b/generation_config.json").exists()


def test_both_spellings_of_rope_are_read(tmp_path: Path) -> None:
    random_llama(tmp_path / "in")
    path = tmp_path / "in/config.json"
    base = json.loads(path.read_text())
    base.pop("rope_parameters")
    llama3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    llama3 |= {"original_max_position_embeddings": 16}
    for rope, theta, scaling in [
        ({}, 1e4, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}}, 5e5, SCALING),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **llama3}}, 5e5, SCALING),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **llama3}}, 5e5, SCALING),
    ]:
        path.write_text(json.dumps(base | rope))
        found = read_config(tmp_path / "in")
        assert (found.rope_theta, found.config.rope_scaling) == (theta, scaling)
        # And so does transformers.
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / "in").rope_parameters
        assert theirs["rope_theta"] == theta
        assert theirs["rope_type"] == ("llama3" if scaling else "default")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"model_type": "mistral"}, ["model_type='mistral'", "LlamaForCausalLM"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["ForSequenceClassification"]),
        ({"attention_bias": True, "mlp_bias": True}, ["attention_bias=True", "mlp_bias=True"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu' (only 'silu' is read)"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}"]),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}, "rope_parameters": None},
            ["rope_scaling type 'yarn' (only 'llama3' and 'default' are read)"],
        ),
        ({"rope_parameters": {"type": "linear", "factor": 2}}, ["type 'linear'"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor is missing"]),
        ({"rope_theta": 7e5}, ["rope_theta=700000 and rope_parameters.rope_theta=10000 disagree"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"hidden_size": 0, "vocab_size": "x"}, ["hidden_size=0", "vocab_size='x'"]),
        ({"num_key_value_heads": 3}, ["model.num_kv_heads=3"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps=-1"]),
        ({"intermediate_size": 41}, ["model.layers.0.mlp.gate_proj.weight is [40, 32] and not"]),
        ({"num_hidden_layers": 3}, ["missing: model.layers.2.input_layernorm.weight", "3 more"]),
        ({"num_hidden_layers": 1}, ["not expected: model.layers.1.", "3 more"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight is not the embedding table"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_no_llama_of_ours_is_refused_by_name(
    change: dict[str, Any], messages: list[str], tmp_path: Path
) -> None:
    random_llama(tmp_path / "in")
    path = tmp_path / "in/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError) as caught:
        from_pretrained(tmp_path / "in")
    for message in messages:
        assert message in str(caught.value)
    assert str(tmp_path / "in") in str(caught.value)


def test_damaged_and_absent_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    with pytest.raises(WeightsError, match=r"in: no such folder; give the folder of a checkpoint"):
        from_pretrained(folder)
    random_llama(folder, max_shard_size="12KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[:-9])
    with pytest.raises(WeightsError, match=r"config\.json: not JSON"):
        from_pretrained(folder)
    (folder / "config.json").write_text(config)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=rf"{shards[1].name}: not a whole safetensors file"):
        from_pretrained(folder)
    shards[1].unlink()
    with pytest.raises(WeightsError, match=rf"1 of \d+ shards are missing: {shards[1].name}"):
        from_pretrained(folder)
    shards[1].write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = weight_map | {"model.norm.weight": shards[0].name}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(WeightsError, match=r"lacks model\.norm\.weight, which the index places"):
        from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(WeightsError, match="not a file of its folder"):
        from_pretrained(folder)
    index.write_text("[]")
    with pytest.raises(WeightsError, match="not an index of shards"):
        from_pretrained(folder)
    index.unlink()
    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors nor"):
        from_pretrained(folder)


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, ("raise SystemExit('a pickle was run')",)


def test_bin_files_are_read_as_tensors_alone(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    llama = random_llama(folder, tie_word_embeddings=True)
    (folder / "model.safetensors").unlink()
    # As old checkpoints are: tied heads and rotary tables are in it too.
    state = llama.state_dict()
    assert "lm_head.weight" in state
    state |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for zipped in (True, False):
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with torch.no_grad():
            logits = from_pretrained(folder).text_logits(TOKENS)
            torch.testing.assert_close(logits, llama(TOKENS).logits, rtol=1e-5, atol=1e-5)
    # Sharded.
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:])):
        torch.save({name: state[name] for name in part}, folder / f"part-{number}.bin")
        weight_map |= {name: f"part-{number}.bin" for name in part}
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with torch.no_grad():
        assert torch.equal(from_pretrained(folder).text_logits(TOKENS), logits)
    torch.save({"model.norm.weight": Evil()}, folder / "part-1.bin")
    with pytest.raises(WeightsError, match=r"part-1\.bin: not a file of tensors alone"):
        from_pretrained(folder)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    random_llama(folder)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is torch\.int8"):
        from_pretrained(folder)


def test_new_vision_tables_are_drawn_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    llama = random_llama(folder)
    with caplog.at_level("INFO", logger=hf.__name__):
        model = from_pretrained(folder, vision_codebook_size=16, seed=5)
    assert "drawn anew: vision_embed.weight, vision_head.weight" in caplog.text
    drawn = WorldModel(model.config, rope_theta=1e4)
    init_weights(drawn, 5)
    assert model.vision_embed is not None and drawn.vision_embed is not None
    assert torch.equal(model.vision_embed.weight, drawn.vision_embed.weight)
    assert torch.equal(model.vision_head.weight, drawn.vision_head.weight)
    assert torch.equal(model.text_embed.weight, llama.model.embed_tokens.weight)
    # Into a model that is there already, of another dtype.
    other = WorldModel(replace(model.config, tie_vision_embeddings=True), rope_theta=1e6).bfloat16()
    loaded = load_pretrained(other, folder, seed=5)
    assert loaded.drawn == ("vision_embed.weight",)
    assert torch.equal(other.text_head.weight, llama.lm_head.weight.bfloat16())
    assert torch.equal(other.vision_embed.weight, drawn.vision_embed.weight.bfloat16())


def test_vision_tables_stay_with_the_model(tmp_path: Path) -> None:
    model = make(FAMILIES["llama2"])
    folder = tmp_path / "out"
    save_pretrained(model, folder)
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert not [name for name in opened.keys() if "vision" in name]
        assert opened.metadata() == {"format": "pt"}
    text = from_pretrained(folder, vision_codebook_size=0)
    assert text.vision_embed is None
    with torch.no_grad():
        assert torch.equal(text.text_logits(TOKENS), model.text_logits(TOKENS))
    left = load_pretrained(text, folder).left
    assert left == ("vision_embed.weight", "vision_head.weight")
    with pytest.raises(WeightsError, match=r"vision_embed\.weight is \[272, 32\] and not \[276"):
        from_pretrained(folder, vision_codebook_size=20)
    # transformers' own copy of the folder has lost them, and says nothing of them.
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder)
    llama.save_pretrained(tmp_path / "copy")
    assert from_pretrained(tmp_path / "copy").config == replace(
        model.config, vision_codebook_size=0
    )
    about = folder / "ringworld/model.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(WeightsError, match="format=9, and 1 is read"):
        from_pretrained(folder)


def test_dtypes_in_and_out(tmp_path: Path) -> None:
    model = make(FAMILIES["lwm"])
    save_pretrained(model, tmp_path / "out", dtype=torch.bfloat16)
    kept = from_pretrained(tmp_path / "out", dtype=None)
    same(make(FAMILIES["lwm"]).bfloat16(), kept)
    same(make(FAMILIES["lwm"]).bfloat16().float(), from_pretrained(tmp_path / "out"))
    save_pretrained(kept, tmp_path / "again")
    for name in ("model.safetensors", "ringworld/vision.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert llama.dtype == torch.bfloat16


def test_one_tensor_at_a_time_is_written(tmp_path: Path) -> None:
    config = FAMILIES["lwm"]
    memory: list[weakref.ref[Any]] = []

    def read(name: str) -> torch.Tensor:
        assert not any(held() is not None for held in memory), f"two tensors at {name}"
        array = np.zeros(parameter_shapes(config)[name], np.float32)
        memory.append(weakref.ref(array))
        return torch.from_numpy(array)

    sink = FolderSink(tmp_path / "out")
    write_pretrained(sink, config, read, rope_theta=1e4, max_shard_bytes=20_000)
    assert set(from_pretrained(tmp_path / "out").state_dict()) >= set(parameter_shapes(config))


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    model = make(FAMILIES["llama2"])
    model.norm.weight = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(WeightsError, match=r"norm\.weight is \[5\] and not \[32\]"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    sound = make(FAMILIES["llama2"])
    (tmp_path / "out").mkdir()
    save_pretrained(sound, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(WeightsError, match="is not empty; give a new folder"):
        save_pretrained(make(FAMILIES["llama3"]), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="is a file"):
        save_pretrained(sound, tmp_path / "file")
    with pytest.raises(WeightsError, match="max_shard_bytes=0 is below 1"):
        save_pretrained(sound, tmp_path / "new", max_shard_bytes=0)
    with pytest.raises(WeightsError, match="dtype=torch.int8: weights are written as"):
        save_pretrained(sound, tmp_path / "new", dtype=torch.int8)
    odd = make(tiny(hidden_size=30, head_dim=8))
    with pytest.raises(WeightsError, match="transformers takes no such Llama"):
        save_pretrained(odd, tmp_path / "new")
