"""Linear algebra of the factorisation: `eigh` with a CPU fallback, ridges and balanced factors."""

from __future__ import annotations

import torch
from torch import Tensor

# Ridge as a fraction of the mean diagonal: makes the Cholesky factor of any calibration usable in float64, far below any
# signal.
RIDGE = 1e-10
# The same for costs: keeps full rank exact for inputs that calibration never saw, without measurable loss of energy.
COST_RIDGE = 1e-6


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of symmetric or Hermitian matrices (..., n, n).

    Where the GPU's solver does not converge, as on steeply graded spectra, LAPACK's is used on the CPU. cuSOLVER may return
    NaN without raising, so the result is checked.
    """
    if not matrix.is_cuda:
        return torch.linalg.eigh(matrix)
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if vectors.isfinite().all():
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


def ridged(moment: Tensor, ridge: float) -> Tensor:
    """Symmetric (..., n, n) matrices plus `ridge` times their mean diagonal on the diagonal.

    To a zero matrix, as from a layer whose weights are zero, `ridge` itself is added.
    """
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    floor = torch.where(mean > torch.finfo(moment.dtype).tiny / ridge, mean, torch.ones_like(mean)) * ridge
    return (moment + moment.mT) / 2 + floor[..., None, None] * torch.eye(moment.shape[-1]).to(moment)


def balance(up: Tensor, down: Tensor) -> Tensor:
    """Factor that makes two matrices with these mean squares about equal, 1 where either is zero.

    It is a power of two, so that scaling does not round.
    """
    ratio = (up / down) ** 0.25
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio)).log2().round().exp2()
