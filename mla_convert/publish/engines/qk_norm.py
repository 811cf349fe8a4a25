"""Norms on queries and keys (Qwen3): the projections and norms before the maps of latent attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mla_convert.publish.engines.latent_attention import Attention

FOLDER = "features."


@dataclass(frozen=True)
class QKNormFeatures:
    """One layer's stored projections and norms. H query heads and G key heads of d_h dims; d inputs."""

    projections: dict[str, Tensor]  # q (H*d_h, d), k and v (G*d_h, d)
    biases: dict[str, Tensor]  # of the same names, if there are any
    q_norm: Tensor  # (d_h,)
    k_norm: Tensor  # (d_h,)

    @classmethod
    def take(cls, stored: dict[str, Tensor]) -> QKNormFeatures:
        """Take the projections and norms out of the tensors of one attention; its q_b_proj is renamed to q_proj."""
        features = cls(
            projections={letter: stored.pop(f"{letter}_proj.weight") for letter in "qkv"},
            biases={letter: stored.pop(f"{letter}_proj.bias") for letter in "qkv" if f"{letter}_proj.bias" in stored},
            q_norm=stored.pop("q_norm.weight"),
            k_norm=stored.pop("k_norm.weight"),
        )
        stored["q_proj.weight"] = stored.pop("q_b_proj.weight")
        return features

    def tensors(self) -> dict[str, Tensor]:
        """The exported layer's tensors: one projection for queries, keys and values."""
        exported = {
            f"{FOLDER}qkv_proj.weight": torch.cat([self.projections[letter] for letter in "qkv"]),
            f"{FOLDER}q_norm.weight": self.q_norm,
            f"{FOLDER}k_norm.weight": self.k_norm,
        }
        if self.biases:
            # The joint projection has a bias for all three or for none.
            empty = {letter: rows.new_zeros(len(rows)) for letter, rows in self.projections.items()}
            exported[f"{FOLDER}qkv_proj.bias"] = torch.cat([(empty | self.biases)[letter] for letter in "qkv"])
        return exported

    def largest_mean_square(self, attention: Attention, norm_weight: Tensor, rank: int) -> float:
        """Upper bound as in `Attention.largest_mean_square`; a normed key has |k|^2 <= d_h, times the norm's weights."""
        width = len(self.projections["k"])
        rows = attention.kv_a[: attention.rank].double()
        keys = rows[:, :width] * self.k_norm.double().repeat(width // len(self.k_norm))
        values = rows[:, width:] @ self.projections["v"].double() * norm_weight.double()
        # Keys and values are bounded by themselves and added, because only the keys are normed.
        size = torch.linalg.matrix_norm(keys, 2) * width**0.5
        size = size + torch.linalg.matrix_norm(values, 2) * len(norm_weight) ** 0.5
        if "v" in self.biases:
            size = size + (rows[:, width:] @ self.biases["v"].double()).norm()
        return float(size.square()) / rank


def block_diagonal(per_head: Tensor, heads: int) -> Tensor:
    """The maps (H * rows, d_h) of each head's features as one map (H * rows, H * d_h) of all heads' features."""
    return torch.block_diag(*per_head.unflatten(0, (heads, -1)))
