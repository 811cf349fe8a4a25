"""`eigh` with a CPU fallback."""

from __future__ import annotations

import torch
from torch import Tensor


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
