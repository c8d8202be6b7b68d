"""Inception score (Salimans et al. 2016): exp(mean_i KL(p(y|x_i) || p(y))), from logits.

Between 1 (no information) and the number of classes. Computed on the whole set; the usual ten
splits lower it at small n, so the number of splits belongs to the protocol. The mean divergence
is H(mean p) - mean H(p_i), so any subset needs only sums of p and of the entropies.
"""

import numpy as np

from mpqdiff.errors import InputError
from mpqdiff.evaluate import intervals
from mpqdiff.evaluate.statistics import CHUNK, finite_features


def inception_score(logits, *, splits: int = 1, shuffle_seed: int | None = None) -> float:
    """Score of `logits` [n,classes], mean over `splits` consecutive parts, as equal as n allows.

    `shuffle_seed` shuffles the images first, as torch-fidelity does (its seed is 2020).
    Raises InputError unless 1 <= splits <= n and the logits are finite.
    """
    logits = finite_features(logits, "logits")
    n = len(logits)
    if not 1 <= splits <= n:
        raise InputError(f"got splits={splits} for {n} images, expected 1 to n")
    order = np.arange(n)
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(n)
    parts = np.zeros((splits, n), bool)
    for i in range(splits):
        parts[i, order[i * n // splits : (i + 1) * n // splits]] = True
    return float(np.mean(_scores(logits, parts)))


def delete_d_scores(logits, omitted) -> np.ndarray:
    """Scores [B], 1 split, of `logits` [n,classes] without the rows `omitted` [B,d]."""
    logits = finite_features(logits, "logits")
    return _scores(logits, intervals.kept_rows(omitted, len(logits)))


def _scores(logits, kept) -> np.ndarray:
    """The score of each subset of rows in `kept` bool [B,n]: [B]."""
    marginals = np.zeros((len(kept), logits.shape[1]))
    negentropies = np.zeros(len(kept))
    for start in range(0, len(logits), CHUNK):
        rows = logits[start : start + CHUNK].astype(np.float64)
        log_p = rows - rows.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        weights = kept[:, start : start + CHUNK].astype(np.float64)
        marginals += weights @ p
        negentropies += weights @ np.sum(p * log_p, axis=1)
    counts = kept.sum(axis=1)
    marginals /= counts[:, None]
    # A class of probability 0 everywhere contributes 0 to the divergence, not NaN.
    logs = np.log(np.where(marginals > 0, marginals, 1.0))
    return np.exp(negentropies / counts - np.sum(marginals * logs, axis=1))
