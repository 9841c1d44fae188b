"""A VQGAN as a frame tokenizer: files, batches, devices and digest around the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ringworld_model.vision.codes import checked_codes
from ringworld_model.vision.frames import Frames, as_frames
from ringworld_model.vision.vqgan import VQGAN, from_pixels, to_pixels
from ringworld_model.vision.vqgan_config import CONFIG_FILE, VQGANConfig

Precision = Literal["fp32", "bf16"]

CODEBOOK_FOLDER = "codebook"
"""Folder of a VQGAN inside the folder that it is saved into."""

WEIGHTS_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""Where weights lie beside config.json; the first is what diffusers writes, and what is written."""

_BATCH_BYTES = {"cpu": 2**29, "cuda": 2**33}
_LIVE_MAPS = 8
"""Feature maps of the finest level that are alive at one time, measured and rounded up."""


class VQGANTokenizer:
    """Frames to codes and back through a VQGAN.

    Attributes:
        model: the network, on its device, in float32.
        precision: of its convolutions.
    """

    def __init__(self, model: VQGAN, device: str = "cpu", precision: Precision = "fp32") -> None:
        """Move the network to a device.

        Args:
            model: the network.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            precision: ``fp32`` (without TF32, so that a GPU finds the codes that a CPU finds, near
                ties apart) or ``bf16``.

        Raises:
            ValueError: an unknown precision.
        """
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={precision!r}; write fp32 or bf16")
        # A model that is still being trained keeps its gradients: nothing here asks for them.
        self.model = model.to(device)
        self.precision = precision
        self._device = torch.device(device)

    @property
    def codebook_size(self) -> int:
        """Codes; eof and eov come after them."""
        return self.model.config.codebook_size

    @property
    def frame_size(self) -> int:
        """Pixels of a side of a frame."""
        return self.model.config.frame_size

    @property
    def codes_per_frame(self) -> int:
        """Codes of one frame."""
        return self.model.config.codes_per_frame

    @property
    def batch_frames(self) -> int:
        """Frames that go through the network at one time, by the memory that they take."""
        config = self.model.config
        frame_bytes = 4 * config.block_out_channels[0] * config.frame_size**2 * _LIVE_MAPS
        return max(1, _BATCH_BYTES.get(self._device.type, 2**29) // frame_bytes)

    def encode(self, frames: Frames) -> NDArray[np.int32]:
        """Codes of frames, in batches.

        Args:
            frames: uint8 [F, N, N, 3], resized and cropped already (``resize_and_crop``).

        Returns:
            int32 [F, codes_per_frame].

        Raises:
            ValueError: frames of another size.
        """
        source, size = as_frames(frames), self.frame_size
        if tuple(source.shape[1:3]) != (size, size):
            raise ValueError(
                f"frames are {source.shape[1]}x{source.shape[2]} pixels, the VQGAN's are "
                f"{size}x{size}; resize_and_crop them first"
            )
        codes = np.empty((len(source), self.codes_per_frame), dtype=np.int32)
        with self._computing():
            for start in range(0, len(source), self.batch_frames):
                batch = source[start : start + self.batch_frames]
                found = self.model.codes(self.model.latents(from_pixels(batch, self._device)))
                codes[start : start + len(batch)] = found.cpu().numpy()
        return codes

    def decode(self, codes: ArrayLike) -> NDArray[np.uint8]:
        """Frames that the codes stand for, in batches.

        Args:
            codes: ints [F, codes_per_frame].

        Returns:
            uint8 [F, N, N, 3].

        Raises:
            ValueError: another number of codes a frame, or one out of range.
        """
        ids = torch.from_numpy(checked_codes(codes, self.codebook_size, self.codes_per_frame))
        size, side = self.frame_size, self.model.config.codes_per_side
        frames = np.empty((len(ids), size, size, 3), dtype=np.uint8)
        with self._computing():
            for start in range(0, len(ids), self.batch_frames):
                batch = ids[start : start + self.batch_frames].to(self._device)
                made = self.model.reconstruct(self.model.lookup(batch, side))
                frames[start : start + len(batch)] = to_pixels(made).cpu().numpy()
        return frames

    def digest(self) -> str:
        """SHA-256 (hex) of shape, weights and precision; equal digests mean equal codes."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        shape = json.dumps(self.model.config.to_json(), sort_keys=True)
        sha = hashlib.sha256(f"vqgan {self.precision} {shape}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(f"{name} {tuple(tensor.shape)}".encode())
            sha.update(tensor.cpu().contiguous().numpy().astype("<f4", copy=False).data)
        return sha.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a dataset's meta.json says of the tokenizer."""
        config = self.model.config
        return {
            "kind": "vqgan",
            "size": self.codebook_size,
            "codes_per_frame": self.codes_per_frame,
            "frame_size": self.frame_size,
            "block_out_channels": list(config.block_out_channels),
            "latent_channels": config.latent_channels,
            "precision": self.precision,
            "digest": self.digest(),
        }

    def save(self, folder: Path) -> None:
        """Write ``codebook/config.json`` and its weights below a folder; diffusers loads them."""
        from safetensors.torch import save_file

        target = Path(folder) / CODEBOOK_FOLDER
        target.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.cpu().contiguous() for name, t in self.model.state_dict().items()}
        save_file(tensors, target / WEIGHTS_FILES[0], metadata={"format": "pt"})
        text = json.dumps(self.model.config.to_json(), indent=1)
        (target / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, folder: Path | str, device: str = "cpu", precision: Precision = "fp32"
    ) -> VQGANTokenizer:
        """Read config.json and weights in the layout of diffusers' VQModel.

        Args:
            folder: the folder that holds both; weights are safetensors in any float dtype.
            device: as above.
            precision: as above.

        Raises:
            ValueError: a shape that is not built here, or weights that do not fit it.
        """
        folder = Path(folder)
        config = VQGANConfig.read(folder)
        with torch.device("meta"):
            model = VQGAN(config)
        # Assigned, not copied: the weights are in memory once.
        model.load_state_dict(_weights(folder, model.state_dict()), assign=True)
        return cls(model, device, precision)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        half = torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bf16")
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), half, exact:
            yield


def _weights(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights beside config.json, float32, checked against what the network has."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(
            f"{folder} holds no {' or '.join(WEIGHTS_FILES)}; save the model as safetensors, "
            "other formats are not read"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its {CONFIG_FILE}: "
            f"{len(missing)} tensors are missing{_first(missing)}, "
            f"{len(extra)} are not known{_first(extra)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}; its {CONFIG_FILE} asks "
                f"for {tuple(expected[name].shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are no finite numbers")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _first(names: list[str]) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""
