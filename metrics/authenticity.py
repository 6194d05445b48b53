"""AuthPct: the share of generated images that are not copies of training images (Alaa et al. 2022, section 3.3)."""

from __future__ import annotations

from torch import Tensor

from metrics.feature_stats import Result
from metrics.precision_recall import nearest


def authentic_percent(train: Tensor, fake: Tensor) -> float:
    """Return the share, in percent, of fakes (M, F) that are authentic with respect to training features (N, F).

        authentic_i = d(fake_i, train_j) > min_{k != j} d(train_j, train_k),     j = argmin_j d(fake_i, train_j)

    as in Stein et al. 2023, for N of at least 2. A sample from the distribution of the training images is not authentic
    if it and a training image are nearest neighbours of each other; so a third of such samples are authentic for F = 1,
    more in features of images. Collective.
    """
    _, index = nearest(fake, train)  # j
    closest, place = index.unique(return_inverse=True)
    _, other = nearest(train[closest], train, skip=closest)  # k
    # The distances of the search are products of matrices, in which small distances cancel.
    distance, own = (fake - train[index]).norm(dim=1), (train[closest] - train[other]).norm(dim=1)
    return 100 * float((distance > own[place]).double().mean())


def authenticity_numbers(train: Result, fake: Result) -> dict[str, float]:
    """Return the share of two Rows as the only value of the metric."""
    return {"": authentic_percent(train["rows"], fake["rows"])}
