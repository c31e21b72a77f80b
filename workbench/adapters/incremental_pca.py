"""Incremental principal component analysis: one batch at a time, without keeping the data (Ross et al. 2008,
"Incremental learning for robust visual tracking", section 3; scikit-learn's estimator of the same name)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class IncrementalPCA:
    """Principal components of data `(samples, features)` that come in batches.

    Args:
        n_components: components to keep; by default as many as the first batch allows.
        copy: leave the batches as they are; otherwise they may be overwritten.
        batch_size: samples a step in `fit`; default: five times the features.
        svd_driver: passed to `torch.linalg.svd`, CUDA only.
        lowrank: a faster, randomised SVD.
        lowrank_q: its rank; default: twice `n_components`.
        lowrank_niter: its subspace iterations.
        lowrank_seed: seed of its draws, the global generator being left alone; None draws from that.

    Attributes:
        components_: `(n_components, features)`, of unit length, the most important first.
        singular_values_, explained_variance_, explained_variance_ratio_: `(n_components,)`.
        mean_, var_: of each feature, in float64. n_samples_seen_: samples so far, `(1,)`.

    Raises:
        ValueError: a batch has fewer samples or features than components, or other features than the first one.
    """

    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    noise_variance_: Tensor
    mean_: Tensor
    var_: Tensor
    n_samples_seen_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ):
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            lowrank_q = 2 * n_components
        if lowrank and n_components is not None and lowrank_q is not None and lowrank_q < n_components:
            raise ValueError("lowrank_q must be greater than or equal to n_components.")
        self.n_components, self.copy, self.batch_size, self.svd_driver = n_components, copy, batch_size, svd_driver
        self.lowrank, self.lowrank_q = lowrank, lowrank_q
        self.lowrank_niter, self.lowrank_seed = lowrank_niter, lowrank_seed

    def fit(self, X: Any) -> IncrementalPCA:
        """Take in all data, batch by batch."""
        X = self._checked(X)
        size = self.batch_size or 5 * X.shape[1]
        for batch in self.gen_batches(len(X), size, min_batch_size=self.n_components or 0):
            self._step(X[batch])
        return self

    def partial_fit(self, X: Any) -> IncrementalPCA:
        """Take in one batch `(samples, features)`: the SVD of the components so far, weighted, and the new data."""
        self._step(self._checked(X))
        return self

    def _step(self, X: Tensor) -> None:
        samples, features = X.shape
        first = not hasattr(self, "components_")
        if first:
            self.n_components = self.n_components or min(samples, features)
            self.mean_ = self.var_ = torch.zeros(features, dtype=torch.float64, device=X.device)
            self.n_samples_seen_ = torch.tensor([0], device=X.device)
        elif features != len(self.mean_):
            raise ValueError(
                "Number of features of the new batch does not match the number of features of the first batch."
            )
        seen = self.n_samples_seen_
        total = seen + samples
        batch_mean = X.mean(0, dtype=torch.float64)
        # sums of squares add up, plus what the means lie apart (Chan et al. 1983, eq. 2.1)
        apart = (self.mean_ - batch_mean).square() * seen * samples / total
        spread = (X - batch_mean).square().sum(0)
        var = (self.var_ * seen + spread + apart) / total
        X = (X - batch_mean).to(X.dtype)
        if not first:
            shift = (seen.double() * samples / total).sqrt() * (self.mean_ - batch_mean)
            X = torch.vstack((self.singular_values_[:, None] * self.components_, X, shift))  # float64 from here on
        S, Vh = self._svd(X)
        Vh = Vh * Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()  # of each sign the one with a positive peak
        variance, kept = S.square() / (total - 1), self.n_components
        self.mean_ = (self.mean_ * seen + batch_mean * samples) / total
        self.var_, self.n_samples_seen_ = var, total
        self.components_, self.singular_values_ = Vh[:kept], S[:kept]
        self.explained_variance_ = variance[:kept]
        self.explained_variance_ratio_ = (S.square() / (var * total).sum())[:kept]
        rest = variance[kept:]
        self.noise_variance_ = rest.mean() if kept not in (samples, features) else variance.new_zeros(())

    def transform(self, X: Tensor) -> Tensor:
        """The data `(samples, features)` in the components' coordinates, `(samples, n_components)`."""
        return ((X - self.mean_) @ self.components_.T.double()).to(X.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of `batch_size` that cover `range(n)`; the last one is smaller, or larger if it would be too small."""
        start = 0
        while start + batch_size + min_batch_size <= n:
            yield slice(start, start + batch_size)
            start += batch_size
        if start < n:
            yield slice(start, n)

    def _svd(self, X: Tensor) -> tuple[Tensor, Tensor]:
        if not self.lowrank:
            _, S, Vh = torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)
            return S, Vh
        with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            _, S, V = torch.svd_lowrank(X, q=self.lowrank_q, niter=self.lowrank_niter)
        return S, V.mH

    def _checked(self, X: Any) -> Tensor:
        X = X if isinstance(X, Tensor) else torch.tensor(X, dtype=torch.float32)
        samples, features = X.shape
        if self.n_components is not None and self.n_components > features:
            raise ValueError(
                f"n_components={self.n_components} invalid for n_features={features}, need more rows than columns for "
                "IncrementalPCA processing."
            )
        if self.n_components is not None and self.n_components > samples:
            raise ValueError(
                f"n_components={self.n_components} must be less or equal to the batch number of samples {samples}"
            )
        return X if X.dtype in (torch.float32, torch.float64) else X.float()
