"""The Large World Model's JAX layout: files written with msgpack as flax writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from ringworld_model.config import ModelConfig
from ringworld_model.hf_config import WeightsError
from ringworld_model.lwm import from_lwm, load_lwm
from ringworld_model.lwm_file import read_index
from ringworld_model.lwm_layout import table_sizes
from ringworld_model.transformer import WorldModel, init_weights

CONFIG = ModelConfig(
    hidden_size=32,
    ffn_size=44,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    text_vocab_size=48,
    vision_codebook_size=16,
    rope_form="interleaved",
    init_std=0.2,
)
TOKENS = torch.arange(40)[None] % 48

LAYER_NAMES = {
    "attention.q_proj": "attention/wq/kernel",
    "attention.k_proj": "attention/wk/kernel",
    "attention.v_proj": "attention/wv/kernel",
    "attention.o_proj": "attention/wo/kernel",
    "mlp.gate_proj": "feed_forward/w1/kernel",
    "mlp.down_proj": "feed_forward/w2/kernel",
    "mlp.up_proj": "feed_forward/w3/kernel",
    "attention_norm": "attention_norm/kernel",
    "mlp_norm": "ffn_norm/kernel",
}


def release_params(model: WorldModel, *, stacked: bool, vision: bool) -> dict[str, np.ndarray]:
    """A model's weights under the names of lwm/vision_llama.py, kernels [in, out]."""
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    layers = range(model.config.num_layers)
    found = {
        "transformer/wte/embedding": weights["text_embed.weight"],
        "transformer/ln_f/kernel": weights["norm.weight"],
        "lm_head/kernel": weights["text_head.weight"].T,
    }
    if vision:
        found["transformer/vte/embedding"] = weights["vision_embed.weight"]
        found["vision_head/kernel"] = weights["vision_head.weight"].T
    for ours, theirs in LAYER_NAMES.items():
        each = [weights[f"layers.{n}.{ours}.weight"].T for n in layers]
        if stacked:
            found[f"transformer/h/scan_decoder/{theirs}"] = np.stack(each)
        else:
            found |= {f"transformer/h/{n}/{theirs}": each[n] for n in layers}
    return found


def flax_bytes(array: Any, chunk_bytes: int | None) -> bytes:
    """What flax.serialization.to_bytes makes of an array, or of a number."""
    if not isinstance(array, np.ndarray | torch.Tensor):
        return msgpack.packb(array)

    def extension(part: Any) -> msgpack.ExtType:
        dtype = str(part.dtype).removeprefix("torch.")
        data = part.view(torch.int16).numpy() if isinstance(part, torch.Tensor) else part
        packed = msgpack.packb((tuple(part.shape), dtype, data.tobytes("C")), use_bin_type=True)
        return msgpack.ExtType(1, packed)

    size = array.size if isinstance(array, np.ndarray) else array.numel()
    if chunk_bytes is None or size * array.itemsize <= chunk_bytes:
        return msgpack.packb(extension(array), strict_types=True)
    flat, step = array.reshape(-1), chunk_bytes // array.itemsize
    chunks = [flat[start : start + step] for start in range(0, size, step)]
    content = {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(array.shape)},
        "chunks": {str(i): extension(chunk) for i, chunk in enumerate(chunks)},
    }
    return msgpack.packb(content, strict_types=True)


def write_stream(
    path: Path, params: dict[str, Any], *, prefix: str = "", chunk_bytes: int | None = None
) -> Path:
    """One record a tensor, as the release's checkpointer streams them."""
    with path.open("wb") as file:
        for name, array in params.items():
            key = tuple((prefix + name).split("/"))
            file.write(msgpack.Packer().pack((key, flax_bytes(array, chunk_bytes))))
    return path


@pytest.fixture
def model() -> WorldModel:
    made = WorldModel(CONFIG, rope_theta=5e7)
    init_weights(made, 3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return made


def same(found: WorldModel, expected: WorldModel, but: tuple[str, ...] = ()) -> None:
    weights = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        if name not in but:
            assert torch.equal(parameter, weights[name].to(parameter.dtype)), name


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("chunk_bytes", [None, 1000])
def test_a_file_of_the_release_is_read(
    model: WorldModel, stacked: bool, chunk_bytes: int | None, tmp_path: Path
) -> None:
    params = release_params(model, stacked=stacked, vision=True)
    write_stream(tmp_path / "params", params, chunk_bytes=chunk_bytes)
    (tmp_path / "metadata.pkl").write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    found = from_lwm(tmp_path, CONFIG, rope_theta=5e7)
    same(found, model)
    # The other pairing computes the same with the same weights.
    half = from_lwm(tmp_path / "params", replace(CONFIG, rope_form="half"), rope_theta=5e7)
    assert not torch.equal(
        half.layers[0].attention.q_proj.weight, model.layers[0].attention.q_proj.weight
    )
    with torch.no_grad():
        expected = model.text_logits(TOKENS)
        torch.testing.assert_close(half.text_logits(TOKENS), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.text_logits(TOKENS), expected)


def test_a_text_model_gets_new_vision_tables_and_the_other_way_round(
    model: WorldModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = write_stream(tmp_path / "text", release_params(model, stacked=True, vision=False))
    with caplog.at_level("INFO"):
        found = from_lwm(text, CONFIG, rope_theta=1e6, seed=4)
    assert "drawn anew: vision_embed.weight, vision_head.weight" in caplog.text
    same(found, model, but=("vision_embed.weight", "vision_head.weight"))
    drawn = WorldModel(CONFIG, rope_theta=1e6)
    init_weights(drawn, 4)
    assert torch.equal(found.vision_head.weight, drawn.vision_head.weight)

    both = write_stream(tmp_path / "both", release_params(model, stacked=True, vision=True))
    text_only = WorldModel(replace(CONFIG, vision_codebook_size=0), rope_theta=1e6)
    loaded = load_lwm(text_only, both)
    assert loaded.left == ("transformer/vte/embedding", "vision_head/kernel")
    same(text_only, model)
    assert table_sizes(read_index(text)) == (48, None)
    assert table_sizes(read_index(both)) == (48, 16)


def test_bfloat16_tied_tables_and_a_whole_train_state(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_text_embeddings=True, tie_vision_embeddings=True)
    model = WorldModel(config, rope_theta=1e4)
    init_weights(model, 1)
    model = model.bfloat16()
    fp32 = {n: p.detach().float() for n, p in model.named_parameters()}
    as_fp32 = WorldModel(config, rope_theta=1e4)
    as_fp32.load_state_dict(fp32, strict=False)
    params: dict[str, Any] = {
        name: torch.from_numpy(array.copy()).bfloat16()
        for name, array in release_params(untied(as_fp32), stacked=True, vision=True).items()
        if not name.endswith("head/kernel")
    }
    state = {f"params/params/{name}": array for name, array in params.items()}
    state |= {"step": 12, "opt_state/0/mu/transformer/wte/embedding": np.ones((2, 2))}
    write_stream(tmp_path / "streaming_train_state", state, chunk_bytes=800)
    found = from_lwm(tmp_path, config, rope_theta=1e4, dtype=torch.bfloat16)
    same(found, model)
    assert found.text_head.weight is found.text_embed.weight
    same(from_lwm(tmp_path, config, rope_theta=1e4), model.float())


def untied(model: WorldModel) -> WorldModel:
    """The same model with heads of their own."""
    config = replace(model.config, tie_text_embeddings=False, tie_vision_embeddings=False)
    other = WorldModel(config, rope_theta=model.rope_theta)
    other.load_state_dict(model.state_dict())
    return other


def test_what_does_not_fit_is_named(model: WorldModel, tmp_path: Path) -> None:
    params = release_params(model, stacked=True, vision=True)
    wq = "transformer/h/scan_decoder/attention/wq/kernel"
    changed = {name: array for name, array in params.items() if name != "lm_head/kernel"}
    changed |= {wq: params[wq][:2], "other/kernel": np.ones(3, np.float32)}
    changed["transformer/ln_f/kernel"] = np.ones(32, np.int32)
    write_stream(tmp_path / "params", changed)
    with pytest.raises(WeightsError) as caught:
        load_lwm(model, tmp_path)
    for part in (
        f"{tmp_path / 'params'}: missing: lm_head/kernel",
        "not expected: other/kernel",
        f"{wq} is [2, 32, 32] and not [3, 32, 32]",
        "transformer/ln_f/kernel is int32",
    ):
        assert part in str(caught.value)
    with pytest.raises(WeightsError, match="holds none of params, streaming_params"):
        load_lwm(model, tmp_path.parent)
    with pytest.raises(WeightsError, match="no such file"):
        load_lwm(model, tmp_path / "absent")


def test_damaged_files_are_refused_at_their_byte(model: WorldModel, tmp_path: Path) -> None:
    path = tmp_path / "params"
    write_stream(path, release_params(model, stacked=False, vision=False), chunk_bytes=1000)
    whole = path.read_bytes()
    before = {name: p.clone() for name, p in model.named_parameters()}
    generator = np.random.default_rng(0)
    refused = 0
    for cut in [1, 2, 40, len(whole) - 1, *generator.integers(3, len(whole), 30).tolist()]:
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=r"params: (not a whole|missing|holds no)"):
            load_lwm(model, path)
        refused += 1
    # Noise in the heads of the first records.
    for at in range(0, 60):
        noise = bytearray(whole)
        noise[at] ^= 0xFF
        path.write_bytes(noise)
        try:
            load_lwm(model, path)
        except WeightsError:
            refused += 1
    assert refused > 60
    for content in (b"", b"\x80\x04\x95", b"PK\x03\x04" + whole, b'{"a": 1}'):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="streaming parameter file|holds no arrays"):
            load_lwm(model, path)
    path.write_bytes(whole)
    load_lwm(model, path)
    for name, parameter in model.named_parameters():
        if not name.startswith("vision"):
            assert torch.equal(parameter, before[name]), name
