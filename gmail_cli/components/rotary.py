"""Rotary positions in a CLIP's text tower: what a token attends to depends on how far away it is, whatever the length.

TULIP (Najdenkoska et al. 2025) replaces the learned position embeddings of a CLIP, which end with its context, by
rotary ones (RoFormer, Su et al. 2021). A tower that has them says so in its config (``text_cfg.rotary_base``), at which
plain open_clip stops: it knows no such tower.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from gmail_cli.errors import UsageError

KEY = "rotary_base"
"""Of ``text_cfg``: the base of the rotations, where there are any."""
BASE = 10000.0


def rotate(values: Float[Tensor, "*batch length dim"], *, base: float = BASE) -> Float[Tensor, "*batch length dim"]:
    """Queries or keys turned by their positions: components 2i and 2i + 1 of position p by ``p / base^(2i / dim)``.

    The product of a query and a key then depends on their contents and their distance alone.
    """
    length, dim = values.shape[-2:]
    speeds = base ** (-torch.arange(0, dim, 2, device=values.device, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(length, device=values.device, dtype=torch.float64), speeds)
    cos, sin = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    even, odd = values[..., 0::2], values[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class RotaryAttention(nn.Module):
    """``nn.MultiheadAttention`` with its own weights, under the same names, and rotary positions."""

    def __init__(self, attention: nn.MultiheadAttention, *, base: float) -> None:
        super().__init__()
        self.heads, self.base = attention.num_heads, base
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(
        self,
        query: Float[Tensor, "batch length width"],
        key: Float[Tensor, "batch length width"],
        value: Float[Tensor, "batch length width"],
        need_weights: bool = False,
        attn_mask: Float[Tensor, "length length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], None]:
        """Self-attention, as open_clip's blocks call it: the three inputs are one, and no weights are given back."""
        assert query is key, "rotary positions are those of one sequence"
        projected = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        split = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        turned = (rotate(split[0], base=self.base), rotate(split[1], base=self.base), split[2])
        mask = None if attn_mask is None else attn_mask.to(projected.dtype)
        found = functional.scaled_dot_product_attention(*turned, attn_mask=mask)
        return self.out_proj(found.transpose(1, 2).flatten(2)), None


def make_rotary(model: Any, *, base: float, name: str) -> None:
    """Give an open_clip model's text tower rotary positions in place of its own, which become zero and stay so.

    Args:
        model: Changed in place; every other weight stays.
        base: See `rotate`.
        name: What to call the model in an error.

    Raises:
        UsageError: The tower has no learned positions, is no plain transformer, or has heads of an odd width.
    """
    tower = getattr(model, "text", model)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", ())
    positions = getattr(tower, "positional_embedding", None)
    plain = [block for block in blocks if isinstance(getattr(block, "attn", None), nn.MultiheadAttention)]
    if positions is None or not plain or len(plain) != len(blocks):
        raise UsageError(
            f"the text tower of {name} has no learned positions to replace by rotary ones",
            hint="Take a CLIP with open_clip's own text transformer, or train.positions=stretched.",
        )
    if plain[0].attn.head_dim % 2:
        raise UsageError(
            f"the text tower of {name} has heads of width {plain[0].attn.head_dim}, and rotations take pairs",
            hint="Use --set train.positions=stretched.",
        )
    for block in plain:
        block.attn = RotaryAttention(block.attn, base=base)
    positions.data.zero_()
    positions.requires_grad_(False)
