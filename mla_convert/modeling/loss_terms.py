"""Terms of the distillation loss, and their weights."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100  # label of a position that has no next token in its document


@dataclass(frozen=True)
class LossWeights:
    """Weights of KL(original || model) and of the text's cross-entropy, and the temperature of the former.

    At temperature T both distributions are flattened by 1/T and the divergence is multiplied by T**2, so that its gradient
    keeps its scale (Hinton et al., arXiv 1503.02531).
    """

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0
