r"""How far a sample is from another: exact Wasserstein-1 distance and the classifier two-sample test.

References:
    Crouse, "On implementing 2D rectangular assignment algorithms", 2016, https://doi.org/10.1109/TAES.2016.140952
    Lopez-Paz, Oquab, "Revisiting classifier two-sample tests", 2017, https://arxiv.org/abs/1610.06545
    Lueckmann et al., "Benchmarking simulation-based inference", 2021, https://arxiv.org/abs/2101.04653
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError


def wasserstein1(a: Float[Tensor, "count dim"], b: Float[Tensor, "count dim"]) -> float:
    r"""The Wasserstein-1 distance of two samples of equal size, with the Euclidean distance as cost.

    :math:`W_1 = \min_\pi \frac1n \sum_i \|a_i - b_{\pi(i)}\|` over permutations: an assignment problem, solved exactly.
    Two samples of one law have a positive distance; compare with that.

    Args:
        a: A sample.
        b: Another.

    Raises:
        InputError: If the sizes differ or a value is not finite.
    """
    # Imported where it is used, so that the library starts without it.
    from scipy.optimize import linear_sum_assignment

    _check(a, b)
    if len(a) != len(b):
        raise InputError(f"The samples have {len(a)} and {len(b)} points; give as many of both.")
    cost = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return cost[rows, columns].mean().item()


def c2st(
    a: Float[Tensor, "count_a dim"],
    b: Float[Tensor, "count_b dim"],
    *,
    seed: int = 1,
    folds: int = 5,
) -> float:
    r"""The classifier two-sample test: the accuracy of a network that tells two samples apart, 0.5 if it cannot.

    The protocol of the sbibm benchmark, by scikit-learn: both samples scaled by mean and deviation of the first,
    two hidden layers of ten times the dimension, accuracy in a cross-validation.

    Args:
        a: The reference sample.
        b: The sample to judge.
        seed: Seed of networks and folds.
        folds: Number of folds.

    Raises:
        InputError: If scikit-learn is missing, the dimensions differ, or a value is not finite.
    """
    _check(a, b)
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise InputError(
            "C2ST needs scikit-learn; install it with pip install 'patchflow[bayes]'."
        ) from error
    scale, mean = torch.std_mean(a, 0)
    # Single precision halves the time and leaves the accuracy.
    points = ((torch.cat((a, b)) - mean) / scale.clamp_min(1e-12)).float().cpu().numpy()
    labels = np.repeat([0, 1], [len(a), len(b)])
    width = 10 * a.shape[1]
    network = MLPClassifier(hidden_layer_sizes=(width, width), max_iter=1000, random_state=seed)
    parts = KFold(n_splits=folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(network, points, labels, cv=parts).mean())


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(
            f"Samples of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; give (count, dim) of "
            "equal dim."
        )
    bad = int((~a.isfinite()).sum() + (~b.isfinite()).sum())
    if bad:
        raise InputError(f"{bad} values of the samples are not finite; remove them, and say so.")
