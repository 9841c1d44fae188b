"""The VQGAN of aMUSEd and of the Large World Model: an autoencoder around a codebook.

Convolutions only, no attention. Parameter names are those of diffusers' VQModel, so that published
weights load by name. The name VQGAN is the family's: published ones were trained against a
discriminator too, which is no part of the network and is not needed to use it.

Legend: B frames, C channels, N pixels of a side, n codes of a side, L latent channels, K codes.
Sources: Esser et al., Taming Transformers (2012.09841); aMUSEd (2401.01808).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringworld_model.vision.codes import nearest_codes
from ringworld_model.vision.vqgan_config import VQGANConfig

_EPS = 1e-6


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a short cut."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        """Make the layers; the short cut is a 1x1 convolution where the channels change."""
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=_EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=_EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)
        self.changes = inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if self.changes else x)


class Downsample(nn.Module):
    """Halve height and width by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        """Make the convolution."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H / 2, W / 2]; one row and column of zeros at the far sides."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: repeat pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        """Make the convolution."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of it where another level follows."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: int,
        groups: int,
        down: bool = False,
        up: bool = False,
    ) -> None:
        """Make the blocks; ``down`` and ``up`` say which change of resolution follows, if any."""
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(layers)
        )
        if down:
            self.downsamplers = nn.ModuleList([Downsample(outputs)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H', W']."""
        for children in self.children():
            for layer in children.children():
                x = layer(x)
        return x


class Encoder(nn.Module):
    """Frames to latents."""

    def __init__(self, config: VQGANConfig) -> None:
        """Make the levels, finest first."""
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                channels[max(0, i - 1)],
                width,
                config.layers_per_block,
                groups,
                down=i < len(channels) - 1,
            )
            for i, width in enumerate(channels)
        )
        self.mid_block = Level(channels[-1], channels[-1], 2, groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, N, N] to [B, L, n, n]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, config: VQGANConfig) -> None:
        """Make the levels, coarsest first."""
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = Level(channels[0], channels[0], 2, groups)
        self.up_blocks = nn.ModuleList(
            Level(
                channels[max(0, i - 1)],
                width,
                config.layers_per_block + 1,
                groups,
                up=i < len(channels) - 1,
            )
            for i, width in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, n, n] to [B, 3, N, N]."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Quantizer(nn.Module):
    """The codebook."""

    def __init__(self, config: VQGANConfig) -> None:
        """Make the table, uniform in +-1/K."""
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.latent_channels)
        limit = 1 / config.codebook_size
        nn.init.uniform_(self.embedding.weight, -limit, limit)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Frames are in -1..1."""

    def __init__(self, config: VQGANConfig) -> None:
        """Make the network with random weights."""
        super().__init__()
        self.config = config
        width = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(width, width, 1)
        self.quantize = Quantizer(config)
        self.post_quant_conv = nn.Conv2d(width, width, 1)
        self.decoder = Decoder(config)

    def latents(self, frames: Tensor) -> Tensor:
        """What the codebook is compared with: [B, 3, N, N] to [B, L, n, n]."""
        return self.quant_conv(self.encoder(frames))

    def codes(self, latents: Tensor) -> Tensor:
        """Nearest codes by L2: [B, L, n, n] to int64 [B, n * n], row by row."""
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        codes, _ = nearest_codes(vectors, self.quantize.embedding.weight.detach().float())
        return codes.reshape(len(latents), -1)

    def lookup(self, codes: Tensor, side: int) -> Tensor:
        """The codes' vectors: int64 [B, n * n] to [B, L, n, n].

        Args:
            codes: row by row.
            side: n.
        """
        vectors = self.quantize.embedding(codes)
        return vectors.reshape(len(codes), side, side, -1).permute(0, 3, 1, 2).contiguous()

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Frames of (quantised) latents, [B, L, n, n] to [B, 3, N, N], not clipped."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, frames: Tensor) -> Tensor:
        """Frames through codes and back: [B, 3, N, N], not clipped."""
        latents = self.latents(frames)
        return self.reconstruct(self.lookup(self.codes(latents), latents.shape[-1]))


def to_pixels(frames: Tensor) -> Tensor:
    """Frames in -1..1, [B, 3, N, N], as uint8 [B, N, N, 3]; what lies outside is clipped."""
    scaled = (frames.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_pixels(frames: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 frames [B, N, N, 3] as float32 in -1..1, [B, 3, N, N]."""
    return frames.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
