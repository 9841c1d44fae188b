"""The VQGAN: its shape, its files, and that codes and frames do not depend on how they are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ringworld_model.vision import vqgan_tokenizer
from ringworld_model.vision.frame_tokenizer import load_frame_tokenizer
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_model.vision.vqgan import VQGAN, from_pixels, to_pixels
from ringworld_model.vision.vqgan_config import VQGANConfig
from ringworld_model.vision.vqgan_tokenizer import VQGANTokenizer

TINY = VQGANConfig((8, 16, 16), 1, 6, codebook_size=24, norm_num_groups=4, frame_size=16)


@pytest.fixture(scope="module")
def tokenizer() -> VQGANTokenizer:
    torch.manual_seed(0)
    model = VQGAN(TINY)
    frames = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    # Codes out of the latents, so that many are used.
    with torch.no_grad():
        latents = model.latents(from_pixels(frames)).permute(0, 2, 3, 1).reshape(-1, 6)
        model.quantize.embedding.weight.copy_(latents[:24])
    return VQGANTokenizer(model)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (7, 16, 16, 3), dtype=torch.uint8, generator=generator)


def test_amused_has_its_published_size() -> None:
    with torch.device("meta"):
        model = VQGAN(VQGANConfig())
    count = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    assert round(sum(count.values()) / 1e6, 2) == 146.24
    assert round(count["encoder"] / 1e6, 2) == 58.69
    assert round(count["decoder"] / 1e6, 2) == 87.02
    assert VQGANConfig().codes_per_frame == 256


def test_codes_are_the_nearest_and_decode_to_their_vectors(
    tokenizer: VQGANTokenizer, frames: torch.Tensor
) -> None:
    codes = tokenizer.encode(frames)
    assert codes.dtype == np.int32
    assert codes.shape == (7, 16)
    assert len(np.unique(codes)) > 8
    with torch.no_grad():
        latents = tokenizer.model.latents(from_pixels(frames))
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, 6)
        table = tokenizer.model.quantize.embedding.weight
        assert torch.cdist(vectors, table).argmin(1).tolist() == codes.reshape(-1).tolist()
        quantised = table[torch.from_numpy(codes).long()].transpose(1, 2).reshape(7, 6, 4, 4)
        expected = to_pixels(tokenizer.model.reconstruct(quantised))
    np.testing.assert_array_equal(tokenizer.decode(codes), expected.numpy())
    np.testing.assert_array_equal(to_pixels(from_pixels(frames)), frames)


def test_batches_change_nothing(
    tokenizer: VQGANTokenizer, frames: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, decoded = tokenizer.encode(frames), tokenizer.decode(tokenizer.encode(frames))
    monkeypatch.setitem(vqgan_tokenizer._BATCH_BYTES, "cpu", 3 * 4 * 8 * 16 * 16 * 8)
    assert tokenizer.batch_frames == 3
    np.testing.assert_array_equal(tokenizer.encode(frames.numpy()), codes)
    np.testing.assert_array_equal(tokenizer.decode(codes), decoded)
    assert tokenizer.encode(frames[:0]).shape == (0, 16)
    assert tokenizer.decode(codes[:0]).shape == (0, 16, 16, 3)


def test_what_is_saved_is_found_again(
    tokenizer: VQGANTokenizer, frames: torch.Tensor, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "codebook"):
        loaded = load_frame_tokenizer(path)
        assert loaded.digest() == tokenizer.digest()
        assert loaded.describe() == tokenizer.describe()
        np.testing.assert_array_equal(loaded.encode(frames), tokenizer.encode(frames))
    half = load_frame_tokenizer(tmp_path, precision="bf16")
    assert half.digest() != tokenizer.digest()
    difference = half.decode(half.encode(frames)).astype(int) - tokenizer.decode(
        half.encode(frames)
    )
    assert 0 < np.abs(difference).mean() < 4
    with torch.no_grad():
        moved = VQGAN(TINY)
        moved.load_state_dict(tokenizer.model.state_dict())
        moved.decoder.conv_out.bias[0] += 1e-3
    assert VQGANTokenizer(moved).digest() != tokenizer.digest()


def test_every_kind_is_recognised(tmp_path: Path, frames: torch.Tensor) -> None:
    patches = PatchCodebook.fit(frames, 8, patch_size=4, iterations=2)
    patches.save(tmp_path / "prepared")
    for path in (tmp_path / "prepared", tmp_path / "prepared" / "codebook.npz"):
        assert load_frame_tokenizer(path).digest() == patches.digest()
    assert patches.describe()["kind"] == "patch"
    with pytest.raises(ValueError, match="holds no frame tokenizer"):
        load_frame_tokenizer(tmp_path)


def _config(**changes: Any) -> dict[str, Any]:
    return {**VQGANConfig().to_json(), **changes}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_config(_class_name="AutoencoderKL"), r"_class_name='AutoencoderKL'; only VQModel"),
        (_config(mid_block_add_attention=True), "mid_block_add_attention=True is not built here"),
        # VQModel's own default, where the file does not say.
        ({"_class_name": "VQModel"}, "mid_block_add_attention=True is not built here"),
        (_config(act_fn="relu"), "act_fn='relu' is not built here; only 'silu'"),
        (_config(norm_type="spatial"), "norm_type='spatial'"),
        (_config(vq_embed_dim=4), "vq_embed_dim=4 is not built here; only latent_channels=64"),
        (_config(down_block_types=["AttnDownEncoderBlock2D"] * 5), "only DownEncoderBlock2D"),
        (_config(latent_chanels=4), "unknown field latent_chanels=4; is it latent_channels?"),
        (_config(norm_num_groups=48), "128 is not divisible by norm_num_groups=48"),
        (_config(frame_size=250), "frame_size=250 is no multiple of 16"),
        (_config(num_vq_embeddings="many"), "codebook_size='many'"),
        ([], "_class_name=None"),
    ],
)
def test_what_cannot_be_built_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        load_frame_tokenizer(tmp_path)
    assert "config.json: " in str(caught.value)


def test_weights_that_do_not_fit_are_refused(tokenizer: VQGANTokenizer, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tokenizer.save(tmp_path)
    path = tmp_path / "codebook" / "diffusion_pytorch_model.safetensors"
    good = load_file(path)
    bias = "decoder.conv_out.bias"
    for change, message in [
        ({bias: None, "extra": torch.zeros(1)}, r"1 tensors are missing \(decoder.conv_out.bias\)"),
        ({bias: torch.zeros(4)}, r"decoder.conv_out.bias is torch.float32 \(4,\).*asks for \(3,\)"),
        ({bias: torch.full((3,), torch.nan)}, "no finite numbers"),
    ]:
        changed = {name: t for name, t in {**good, **change}.items() if t is not None}
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load_frame_tokenizer(tmp_path)
    path.write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match="cannot be read"):
        load_frame_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="other formats are not read"):
        load_frame_tokenizer(tmp_path)


def test_frames_and_codes_that_do_not_fit_are_refused(
    tokenizer: VQGANTokenizer, frames: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="frames are 8x8 pixels, the VQGAN's are 16x16"):
        tokenizer.encode(frames[:, :8, :8])
    with pytest.raises(ValueError, match=r"code 24 of frame 1 is not in 0..23; leave out eof"):
        tokenizer.decode(np.array([[0] * 16, [0] * 15 + [24]]))
    with pytest.raises(ValueError, match=r"a frame has 16 of them"):
        tokenizer.decode(np.zeros((1, 17), dtype=np.int32))


@pytest.mark.slow
def test_it_is_the_architecture_of_diffusers() -> None:
    """One frame through both, aMUSEd's shape: latents, codes and frame are the same."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    ours = VQGAN(VQGANConfig())
    config = {
        k: v for k, v in ours.config.to_json().items() if k not in ("_class_name", "frame_size")
    }
    theirs = diffusers.VQModel(**config)
    theirs.quantize.embedding.weight.data.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict())
    frame = torch.rand(1, 3, 256, 256) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(frame).latents
        torch.testing.assert_close(ours.latents(frame), latents, rtol=0, atol=1e-6)
        codes = ours.codes(latents)
        assert codes.reshape(-1).tolist() == theirs.quantize(latents)[2][2].reshape(-1).tolist()
        assert len(codes.unique()) > 20
        decoded = theirs.decode(codes, force_not_quantize=True, shape=(1, 16, 16, 64)).sample
        made = ours.reconstruct(ours.lookup(codes, 16))
        torch.testing.assert_close(made, decoded, rtol=0, atol=1e-6)
