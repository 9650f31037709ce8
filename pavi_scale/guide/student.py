"""Multivariate Student t: proposals of the importance refits of the root."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaincinv


@dataclass
class StudentT:
    """Multivariate Student t (normal for df = inf): the proposal family of the importance refits.

    Args:
        loc: `[R]`.
        chol: Lower Cholesky factor of the scale matrix, `[R, R]`.
        df: Degrees of freedom.
    """

    loc: np.ndarray
    chol: np.ndarray
    df: float = math.inf

    def sample(self, normals: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Map standard normals `[K, R]` and uniforms `[K]` to draws `[K, R]`."""
        scale = np.ones(len(normals))
        if math.isfinite(self.df):
            scale = np.sqrt(self.df / np.maximum(_chi2_quantile(uniforms, self.df), 1e-12))
        return self.loc + scale[:, None] * (normals @ self.chol.T)

    def log_prob(self, z: np.ndarray) -> np.ndarray:
        """Log density, `[K]`."""
        r = len(self.loc)
        white = np.linalg.solve(self.chol, (z - self.loc).T).T if r else np.zeros((len(z), 0))
        square = (white * white).sum(-1)
        logdet = np.log(np.diagonal(self.chol)).sum()
        if not math.isfinite(self.df):
            return -0.5 * square - 0.5 * r * math.log(2 * math.pi) - logdet
        nu = self.df
        constant = math.lgamma((nu + r) / 2) - math.lgamma(nu / 2) - 0.5 * r * math.log(nu * math.pi)
        return constant - 0.5 * (nu + r) * np.log1p(square / nu) - logdet


def _chi2_quantile(p: np.ndarray, df: float) -> np.ndarray:
    return np.asarray(2 * gammaincinv(0.5 * df, p))
