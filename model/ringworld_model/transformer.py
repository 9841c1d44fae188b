"""WorldModel: a Llama-style decoder over text and vision tokens, on one rank's share of a ring.

Pre-RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases. Each modality has its table and its
head; the trunk knows none. Attention is handed in, so the same layers run on one device or a ring.

Every rank calls every module once a forward pass, in the same order, with zero rows if need be:
under ZeRO-3 a call is a collective.

Legend: B rows, T tokens of this rank, E hidden size, H query heads, Hkv key heads, D head_dim.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringworld_model.batch import VISION, TrainBatch
from ringworld_model.config import ModelConfig
from ringworld_model.loss import LossSums, Sums, VocabularyHead
from ringworld_model.memory import check_mode, recomputed
from ringworld_model.mlp import SwiGLU
from ringworld_model.offload import ActivationOffload
from ringworld_model.rope import apply_rope, rope_tables

if TYPE_CHECKING:
    from ringworld_model.ring import RingContext

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, T, H, D], k and v [B, T, Hkv, D]) -> out [B, T, H, D]."""


class WorldModel(nn.Module):
    """The decoder with its tables, heads and loss."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rope_theta: float,
        activation_checkpointing: str = "none",
        activation_offload: bool = False,
        mlp_tile_tokens: int | None = None,
        loss_tile_tokens: int = 2048,
    ) -> None:
        """Build the modules in fp32; call ``init_weights`` or load weights before use.

        Args:
            config: the shape.
            rope_theta: base of the rotary embedding, the stage's.
            activation_checkpointing: none, attention_saved or full (``memory.py``).
            activation_offload: keep in host memory what checkpointing keeps (``offload.py``).
            mlp_tile_tokens: tokens whose MLP is computed at one time; None takes all at once.
            loss_tile_tokens: targets whose logits exist at one time.

        Raises:
            ValueError: unknown activation_checkpointing, offload without it, a tile below 1.
        """
        super().__init__()
        self.config = config
        self.rope_theta = rope_theta
        self.activation_checkpointing = check_mode(activation_checkpointing)
        if activation_offload and self.activation_checkpointing == "none":
            raise ValueError(
                "memory.activation_offload moves what checkpointing keeps, and "
                "activation_checkpointing is none; use full or attention_saved"
            )
        self.offload = ActivationOffload() if activation_offload else None
        hidden, tile = config.hidden_size, loss_tile_tokens
        self.text_embed = nn.Embedding(config.text_vocab_size, hidden)
        self.vision_embed = (
            nn.Embedding(config.vision_vocab_size, hidden) if config.vision_vocab_size else None
        )
        self.layers = nn.ModuleList(
            DecoderLayer(
                config, self.activation_checkpointing == "attention_saved", mlp_tile_tokens
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(hidden, config.norm_eps)
        self.text_head = VocabularyHead(hidden, config.text_vocab_size, tile)
        self.vision_head = (
            VocabularyHead(hidden, config.vision_vocab_size, tile)
            if config.vision_vocab_size
            else None
        )
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make tied heads share their table's parameter; ``to_empty`` parts them."""
        if self.config.tie_text_embeddings:
            self.text_head.weight = self.text_embed.weight
        if self.config.tie_vision_embeddings and self.vision_embed and self.vision_head:
            self.vision_head.weight = self.vision_embed.weight

    def forward(self, batch: TrainBatch, ring: RingContext) -> LossSums:
        """Loss sums over this rank's share of the rows.

        A collective over the ring (and over the world under ZeRO-3): every rank calls it together.

        Args:
            batch: this rank's cut, tensors [B, T].
            ring: the plans that cut it, and the group.

        Raises:
            ValueError: vision tokens or targets, and a model without a vision table.
        """
        attends = [ring.attend] * len(self.layers)
        hidden = self.hidden_states(batch.tokens, batch.modality, batch.position_ids, attends)
        hidden = hidden.flatten(0, 1)
        targets, loss_weights = batch.targets.flatten(), batch.loss_weights.flatten()
        positions = batch.position_ids.flatten()
        vision = batch.target_modality.flatten() == VISION
        weighted = loss_weights > 0

        def head_sums(head: VocabularyHead, mine: Tensor) -> Sums:
            rows = mine.nonzero().squeeze(1)
            mine_hidden = hidden.index_select(0, rows)
            return head(mine_hidden, targets[rows], loss_weights[rows], positions[rows])

        text = head_sums(self.text_head, weighted & ~vision)
        if self.vision_head is None:
            self._refuse_vision(weighted & vision)
            pairs = [torch.stack([value, torch.zeros_like(value)]) for value in text]
        else:
            sums = head_sums(self.vision_head, weighted & vision)
            pairs = [torch.stack([text[i], sums[i]]) for i in range(len(text))]
        return LossSums(*pairs)

    def text_logits(self, tokens: Tensor) -> Tensor:
        """Text logits of every position, on one device, without a ring.

        Args:
            tokens: text ids, int64 [B, S]; each row is one segment from position 0.

        Returns:
            float32 [B, S, V].
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        attends = [causal_attention] * len(self.layers)
        hidden = self.hidden_states(tokens, torch.zeros_like(tokens), positions, attends)
        return self.text_head.logits(hidden)

    def hidden_states(
        self, tokens: Tensor, modality: Tensor, position_ids: Tensor, attends: Sequence[Attend]
    ) -> Tensor:
        """What the heads read: the tokens through their tables, all layers and the final norm.

        Args:
            tokens: int64 [B, T], ids in the space of ``modality``; T may be 0.
            modality: [B, T], 0 text, 1 vision.
            position_ids: ints [B, T].
            attends: each layer's attention, in order; one that keeps keys knows its layer so.

        Returns:
            [B, T, E].

        Raises:
            ValueError: vision tokens, and a model without a vision table.
        """
        return self._trunk(self._embed(tokens, modality), position_ids, attends)

    def _embed(self, tokens: Tensor, modality: Tensor) -> Tensor:
        """Embed each token by its modality's table: [B, T] -> [B, T, E]."""
        vision = modality.flatten() == VISION
        if self.vision_embed is None:
            self._refuse_vision(vision)
            return self.text_embed(tokens)
        text_at, vision_at = (~vision).nonzero().squeeze(1), vision.nonzero().squeeze(1)
        flat = tokens.flatten()
        rows = torch.cat([self.text_embed(flat[text_at]), self.vision_embed(flat[vision_at])])
        found_at = torch.cat([text_at, vision_at]).argsort()
        return rows.index_select(0, found_at).unflatten(0, tokens.shape)

    def _trunk(self, hidden: Tensor, position_ids: Tensor, attends: Sequence[Attend]) -> Tensor:
        """All layers and the final norm: [B, T, E] -> [B, T, E]."""
        table_dtype = torch.promote_types(hidden.dtype, torch.float32)
        cos, sin = rope_tables(
            position_ids,
            self.config.head_dim,
            self.rope_theta,
            table_dtype,
            self.config.rope_scaling,
        )
        moved = None
        if self.offload is not None and torch.is_grad_enabled():
            moved = self.offload.forward_pass(hidden.device, len(self.layers), (cos, sin))
        for layer, attend in zip(self.layers, attends, strict=True):
            with moved.layer() if moved else nullcontext():
                # By keyword: ZeRO-3 warns of positional arguments that are no tensors.
                if self.activation_checkpointing == "full":
                    hidden = recomputed(layer, hidden, cos, sin, attend=attend)
                else:
                    hidden = layer(hidden, cos, sin, attend=attend)
        return self.norm(hidden)

    def _refuse_vision(self, vision: Tensor) -> None:
        if vision.any():
            raise ValueError(
                f"the batch has {int(vision.sum())} vision tokens, the model has no vision table; "
                "set model.vision.codebook_size to the data's codebook or drop the source"
            )


class DecoderLayer(nn.Module):
    """Attention and MLP, each on a normed copy, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, attention_saved: bool, mlp_tile_tokens: int | None = None
    ) -> None:
        """Build the parts; ``attention_saved`` recomputes all but the attention in the backward."""
        super().__init__()
        self.attention_saved = attention_saved
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config, mlp_tile_tokens)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """[B, T, E] -> [B, T, E]; ``cos`` and ``sin`` from ``rope_tables``."""
        if self.attention_saved:
            q, k, v = recomputed(self._before, hidden, cos, sin)
            return recomputed(self._after, hidden, attend(q, k, v))
        return self._after(hidden, attend(*self._before(hidden, cos, sin)))

    def _before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.attention_norm(hidden), cos, sin)

    def _after(self, hidden: Tensor, out: Tensor) -> Tensor:
        hidden = hidden + self.attention.o_proj(out.flatten(-2))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Attention(nn.Module):
    """The projections of attention; what lies between them is handed to the layer."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the four projections."""
        super().__init__()
        self.head_dim, self.rope_form = config.head_dim, config.rope_form
        queries, keys = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, E] -> q [B, T, H, D], k and v [B, T, Hkv, D]; q and k turned by RoPE."""
        heads = (-1, self.head_dim)
        q, k, v = (
            proj(hidden).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        form = self.rope_form
        return apply_rope(q, cos, sin, form), apply_rope(k, cos, sin, form), v


@torch.no_grad()
def init_weights(model: WorldModel, seed: int) -> None:
    """Draw all weights anew, see ``draw_weight``.

    Args:
        model: with whole parameters, on any device.
        seed: the job's.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(draw_weight(name, parameter.shape, model.config, seed))


def draw_weight(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """A new parameter: norms are 1, all else is normal with the config's init_std.

    Each parameter has its own generator, seeded by its name and ``seed``, so that the weights
    depend on neither the order in which they are drawn nor the mesh.

    Args:
        name: in the model.
        shape: of the whole parameter.
        config: of the model.
        seed: the job's.

    Returns:
        float32 of that shape, on the CPU.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    # torch's CPU generator uses 32 bits of its seed: hash both into them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{seed}".encode()))
    return torch.empty(shape).normal_(0.0, config.init_std, generator=generator)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention of whole rows, in the layout of ``Attend``."""
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)
