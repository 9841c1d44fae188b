"""The presets against what was published, and shapes that cannot be."""

from __future__ import annotations

import pytest

from ringworld_model.config import PRESETS, preset, preset_rope_theta

# hidden, ffn, layers, heads, kv heads, head_dim, vocabulary, eps, form, tied, theta, and the
# parameters of Meta's models without vision.
PUBLISHED = {
    "debug": (256, 256, 2, 2, 2, 128, 32_000, 1e-6, "interleaved", False, 1e4, None),
    "200m": (1024, 2048, 14, 8, 8, 128, 32_000, 1e-6, "interleaved", False, 1e4, None),
    "1b": (2048, 5504, 22, 16, 16, 128, 32_000, 1e-6, "interleaved", False, 1e4, None),
    "3b": (3200, 8640, 26, 32, 32, 100, 32_000, 1e-6, "interleaved", False, 1e4, None),
    "7b": (4096, 11008, 32, 32, 32, 128, 32_000, 1e-6, "interleaved", False, 1e4, 6_738_415_616),
    "13b": (5120, 13824, 40, 40, 40, 128, 32_000, 1e-6, "interleaved", False, 1e4, 13_015_864_320),
    "30b": (6656, 17920, 60, 52, 52, 128, 32_000, 1e-6, "interleaved", False, 1e4, 32_528_943_616),
    "65b": (8192, 22016, 80, 64, 64, 128, 32_000, 1e-5, "interleaved", False, 1e4, 65_285_660_672),
    "llama2-7b": (4096, 11008, 32, 32, 32, 128, 32_000, 1e-5, "half", False, 1e4, 6_738_415_616),
    "llama2-13b": (5120, 13824, 40, 40, 40, 128, 32_000, 1e-5, "half", False, 1e4, 13_015_864_320),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128, 128_256, 1e-5, "half", False, 5e5, 8_030_261_248),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 64, 128_256, 1e-5, "half", True, 5e5, 1_235_814_400),
}


def test_every_preset_is_as_published() -> None:
    assert PUBLISHED.keys() == PRESETS.keys() - {"tiny"}
    for name, expected in PUBLISHED.items():
        found = PRESETS[name]
        assert (
            found.hidden_size,
            found.ffn_size,
            found.num_layers,
            found.num_heads,
            found.num_kv_heads,
            found.head_dim,
            found.text_vocab_size,
            found.norm_eps,
            found.rope_form,
            found.tie_text_embeddings,
            preset_rope_theta(name),
        ) == expected[:-1], name
        text_only = preset(name, vision_codebook_size=0)
        assert expected[-1] in (None, text_only.num_parameters()), name
        assert found.init_std == 0.02
        assert (found.vision_vocab_size, found.eof_id, found.eov_id) == (8448, 8192, 8193)
        assert not found.tie_vision_embeddings
        assert (found.rope_scaling is None) == (name != "llama3.2-1b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 130, "num_heads": 4}, "model.hidden_size=130 is not divisible by"),
        ({"num_kv_heads": 3}, "model.num_heads=2 is not divisible by model.num_kv_heads=3"),
        ({"head_dim": 33}, "model.head_dim=33 is odd"),
    ],
)
def test_impossible_shapes_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("tiny", **change)
