"""Feature Likelihood Divergence (FLD): fidelity, diversity and novelty in one value (Jiralerspong et al. 2023).

Every generated image is the centre of a Gaussian in feature space, with a variance of its own. The variances are fitted
to the likelihood of the training images. A copy of a training image gets a narrow Gaussian, which is useless for images
that were held out of training. With NLL the mean negative log-likelihood per feature dimension, of held-out images,

    FLD = 100 (NLL of the fakes' mixture - NLL of a mixture with training images as centres)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import Role
from metrics.feature_stats import Rows, StatRequest, statistics_of
from metrics.registry import Measurement, register_metric
from metrics.sampling import MetricContext, Part, gather_rows, own_shard, random_stream
from torch_utils.distributed import all_reduce

NUM_FAKES = 10_000
MAX_IMAGES = 50_000  # training images, held-out images
MIN_IMAGES = 4  # so that half of the training images still differ
STEPS = 50
LEARNING_RATE = 0.5
MIN_DISTANCE = 1e-3  # squared distance of a copy: bounds the likelihood, which would be infinite
BLOCK = 1024  # rows processed at a time
MIN_LOGIT = -80  # smaller responsibilities would be subnormal numbers, which are slow on a CPU
FITTING = "fitting steps"  # name of the progress

Report = Callable[[int], None]  # receives the number of steps done


class Mixture:
    """Equal parts of M Gaussians around centres (M, F) and a broad one around their mean, fitted to points (N, F).

        p(x) = 1 / (M + 1) sum_j N(x; c_j, exp(s_j) I)

    The broad one has the mean square of the points around its centre as variance, so no point has a density near 0.
    The other s maximise the likelihood of the points: Adam from s_j = log((min_i |x_i - c_j|^2 + 0.001) / F).
    Collective: each process computes a share of the points. `report` is called with 0, and after each of the STEPS.
    """

    def __init__(self, centres: Tensor, points: Tensor, report: Report) -> None:
        self.F, self.num_points = points.shape[1], len(points)
        self.centres = torch.cat([centres, centres.mean(dim=0, keepdim=True)]).double()  # (M + 1, F)
        squares = squared_distances(points, self.centres)
        broad = all_reduce(squares[:, -1].sum(dtype=torch.float64)) / self.num_points
        closest = squares.amin(dim=0) if len(squares) else squares.new_full([len(self.centres)], math.inf)
        start = gather_rows(closest[None]).amin(dim=0).double()
        start[-1] = broad
        self.log_variance = torch.log((start + MIN_DISTANCE) / self.F)  # s, (M + 1,)
        self._fit(squares, report)

    def _fit(self, squares: Tensor, report: Report) -> None:
        optimizer = torch.optim.Adam([self.log_variance], lr=LEARNING_RATE)
        report(0)
        for step in range(STEPS):
            self.log_variance.grad = self._gradient(squares)
            optimizer.step()
            self.log_variance.clamp_(min=math.log(MIN_DISTANCE / self.F))
            report(step + 1)

    def _gradient(self, squares: Tensor) -> Tensor:
        """Return the gradient of the NLL per dimension, (M + 1,), with the responsibilities r_ij = p(j | x_i):

        1 / (N F) sum_i r_ij (F - |x_i - c_j|^2 exp(-s_j)) / 2;     0 for the broad Gaussian
        """
        counts, spreads = torch.zeros_like(self.log_variance), torch.zeros_like(self.log_variance)
        for block in squares.split(BLOCK):
            logits = self._log_parts(block)
            logits -= logits.amax(dim=1, keepdim=True)
            parts = logits.clamp_(min=MIN_LOGIT).softmax(dim=1)  # r
            counts += parts.sum(dim=0)
            spreads += parts.mul_(block).sum(dim=0)
        counts[-1] = spreads[-1] = 0
        gradient = self.F * counts - spreads * torch.exp(-self.log_variance)
        return all_reduce(gradient) / (2 * self.num_points * self.F)

    def nll(self, points: Tensor) -> float:
        """Return the mean negative log-likelihood of points (n, F) per dimension, in nats."""
        total = self.log_variance.new_zeros([])
        for block in squared_distances(points, self.centres).split(BLOCK):
            total -= self._log_parts(block).logsumexp(dim=1).sum(dtype=torch.float64)
        constant = math.log(len(self.centres)) / self.F + math.log(2 * math.pi) / 2
        return float(all_reduce(total)) / (len(points) * self.F) + constant

    def _log_parts(self, squares: Tensor) -> Tensor:
        """Return log N(x_i; c_j, exp(s_j) I) + F log(2 pi) / 2 for squared distances (n, M + 1)."""
        s = self.log_variance.float()
        return torch.addcmul(-self.F / 2 * s, squares, torch.exp(-s), value=-0.5)


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """Return |x_i - c_j|^2 for this process's share of points (N, F) and all centres (M, F), float32.

    They are computed in float64, so that the distance of a copy is 0 up to rounding.
    """
    share, squares = own_shard(len(points)), centres.square().sum(dim=1)
    result = torch.empty(len(share), len(centres), device=centres.device)
    for start in range(0, len(share), BLOCK):
        x = points[share.start + start : min(share.start + start + BLOCK, share.stop)].double()
        block = torch.addmm(squares, x, centres.T, alpha=-2) + x.square().sum(dim=1, keepdim=True)
        result[start : start + BLOCK] = block.clamp(min=0)
    return result


def likelihood_divergence(
    train: Tensor, holdout: Tensor, fake: Tensor, order: np.ndarray, report: Report
) -> tuple[float, float]:
    """Return FLD and the generalisation gap of features (N, F). Collective.

    Features are standardised by the held-out images. `order` is a random permutation of the training images: of its
    first half at most as many images as fakes are the centres of the reference mixture, which is fitted to the other
    half. The gap is 100 (NLL of the training images - NLL of the held-out images) under the fakes' mixture. `report`
    receives 0 to 2 STEPS.
    """
    mean, std = holdout.mean(dim=0), holdout.std(dim=0)
    train, holdout, fake = ((x - mean) / torch.where(std > 0, std, 1) for x in (train, holdout, fake))
    mixture = Mixture(fake, train, report)
    nll = mixture.nll(holdout)
    gap = mixture.nll(train) - nll
    index, half = torch.from_numpy(order).to(train.device), len(train) // 2
    centres, points = train[index[:half][: len(fake)]], train[index[half:]]
    reference = Mixture(centres, points, lambda steps: report(STEPS + steps)).nll(holdout)
    return 100 * (nll - reference), 100 * gap


def register_likelihood(pattern: str, role: Role) -> None:
    """Register the metric over the features of a detector."""

    def plan(context: MetricContext, count: int | None) -> list[StatRequest]:
        parts: tuple[Part, Part] = ("train", "holdout")
        sizes = [min(len(replace(context, part=part).reals), MAX_IMAGES) for part in parts]
        if min(sizes) < MIN_IMAGES:
            raise UserError(f"needs at least {MIN_IMAGES} images of each, got {sizes[0]} training, {sizes[1]} held-out")
        reals = [
            StatRequest(of="real", role=role, count=size, recipe=Rows(), part=part)
            for part, size in zip(parts, sizes, strict=True)
        ]
        return [*reals, StatRequest(of="fake", role=role, count=count or NUM_FAKES, recipe=Rows())]

    @register_metric(
        pattern,
        help="feature likelihood divergence of N fakes from images that were not used in training",
        note="requires held-out images; the generalisation gap is below 0 if training images are memorised",
        values=("", "_generalisation_gap"),
        undirected=("_generalisation_gap",),
        protocol="Gaussians at 10,000 fakes or <N>, 50 steps of Adam; at most 50,000 training and 50,000 other images",
        paper="Jiralerspong et al. 2023",
        roles=(role,),
        plan=plan,
        part="train",
    )
    def fld(context: MetricContext, name: str, count: int | None) -> Measurement:
        train, holdout, fake = (statistics_of(context)[request]["rows"] for request in plan(context, count))
        order = random_stream(context.seed, "fld").permutation(len(train))
        context.progress.plan(name, [(FITTING, 2 * STEPS)])
        report = partial(context.progress, FITTING, total=2 * STEPS)
        divergence, gap = likelihood_divergence(train, holdout, fake, order, report)
        return Measurement(
            values={name: divergence, f"{name}_generalisation_gap": gap},
            num_real=len(train),
            num_fake=len(fake),
            num_holdout=len(holdout),
        )


register_likelihood("fld<N>", "inception")
register_likelihood("fld<N>_dinov2", "dinov2")
