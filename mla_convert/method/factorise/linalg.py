"""Linear algebra that does not give up."""

from __future__ import annotations

import torch
from torch import Tensor


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices (..., n, n).

    Where the GPU's solver does not converge, as on steeply graded spectra, LAPACK's does the work on the CPU. Not always
    does it say so: the result is looked at.
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
