"""Terms of the distillation loss, and their weights."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100  # label of a position that has no next token in its document


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms, and the temperature of the KL divergence.

    At temperature T both models' logits are divided by T and the divergence is multiplied by T**2, so that its gradient
    keeps its scale (Hinton et al., arXiv 1503.02531).

    Attributes:
        kl: weight of KL(original || model).
        ce: weight of the cross-entropy of the text.
        temperature: T, > 0.
    """

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0
