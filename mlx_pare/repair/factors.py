"""Symmetric float64 matrices that are factored, inverted and updated in their own memory, and wide ones read in parts.

LAPACK counts columns first. So the half that counts here is the upper one: row i from its diagonal on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

WIDE = 2048  # columns of the tokens that are float64 at a time
PANEL = 256  # rows of a square matrix that are copied at a time
TINY = 1e-30
ROUNDING = 1e-7  # relative error of a Gram matrix whose products were computed in float32


def panels(length: int, step: int) -> Iterator[slice]:
    """Yield slices of ``step`` over a length; the last may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def columns(
    inputs: np.ndarray, kept: np.ndarray | None = None, divisor: np.ndarray | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield columns of the tokens, at most WIDE at a time.

    Args:
        inputs: X, float32 or float64 [tokens, n].
        kept: numbers of the columns to yield, int [kept]; None: all.
        divisor: what the columns are divided by, float64 [n]; None: they stay.

    Returns:
        Pairs: which of the kept columns these are (a slice), and their values, float64 [tokens, at most WIDE].
    """
    for part in panels(inputs.shape[1] if kept is None else len(kept), WIDE):
        own = part if kept is None else kept[part]
        x = inputs[:, own].astype(np.float64)
        if divisor is not None:
            x /= divisor[own]
        yield part, x


def factor(matrix: np.ndarray) -> np.ndarray:
    """Compute the lower Cholesky factor of a symmetric matrix in the memory of that matrix.

    If rounding left the matrix indefinite, its diagonal grows by the share ROUNDING, then by ten times as much, and so
    on, until the factorization works.

    Args:
        matrix: float64 [n, n] in C order; overwritten.

    Returns:
        The factor, float64 [n, n]. What lies above its diagonal has no meaning.

    Raises:
        LinAlgError: the matrix is not positive definite, even with a tenth more on its diagonal.
    """
    from scipy.linalg import lapack

    diagonal, more = matrix.diagonal().copy(), 0.0
    while more < 1:
        low, failed = lapack.dpotrf(matrix.T, lower=1, clean=0, overwrite_a=1)
        if not failed:
            return low
        more = max(ROUNDING, 10 * more)
        mirror(matrix.T)
        np.fill_diagonal(matrix, diagonal * (1 + more))
    raise np.linalg.LinAlgError("a Gram matrix is not positive definite")


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Invert a positive definite matrix in its own memory.

    Args:
        matrix: float64 [n, n] in C order; overwritten.

    Returns:
        The inverse, float64 [n, n]: the same array.

    Raises:
        LinAlgError: as ``factor``.
    """
    from scipy.linalg import lapack

    lapack.dpotri(factor(matrix), lower=1, overwrite_c=1)
    mirror(matrix)
    return matrix


def mirror(matrix: np.ndarray) -> None:
    """Copy what is above the diagonal of a square matrix to the places below it. Args: ``matrix``: changed in place."""
    for rows in panels(len(matrix), PANEL):
        matrix[rows, : rows.start] = matrix[: rows.start, rows].T
        own = np.triu(matrix[rows, rows], 1)
        matrix[rows, rows] = own + own.T + np.diag(matrix[rows, rows].diagonal())


def lower_solve(low: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve a triangular system.

    Args:
        low: lower factor, float64 [n, n].
        right: float64 [n, columns].

    Returns:
        low^-1 right, in C order.
    """
    from scipy.linalg import solve_triangular

    return np.ascontiguousarray(solve_triangular(low, right, lower=True, check_finite=False))


def outer(into: np.ndarray, scale: float, left: np.ndarray, right: np.ndarray) -> None:
    """Add scale * left^T right in place, because the product alone would be as large.

    Args:
        into: float64 [rows, columns] in C order; changed.
        scale: factor.
        left: float64 [k, rows].
        right: float64 [k, columns].
    """
    from scipy.linalg import blas

    blas.dgemm(scale, right.T, left.T, beta=1.0, c=into.T, trans_b=1, overwrite_c=1)


def symmetric_outer(into: np.ndarray, scale: float, rows: np.ndarray) -> None:
    """Add scale * rows^T rows in place to the upper half of a symmetric matrix, which takes half the time.

    Args:
        into: float64 [n, n] in C order; changed.
        scale: factor.
        rows: float64 [k, n] in C order.
    """
    from scipy.linalg import blas

    blas.dsyrk(scale, rows.T, beta=1.0, c=into.T, lower=1, overwrite_c=1)
