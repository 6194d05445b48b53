"""Table of the metrics on detector features: FID, KID, MIND, IS, precision/recall, density/coverage, AuthPct.

Each metric compares a statistic of the reals with the same statistic of the fakes. To add a metric, write a pure
function of two results of metrics/feature_stats.py and add a row to METRICS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from dnnlib.config import UserError
from metrics.authenticity import authenticity_numbers
from metrics.detectors import TVGG16, Role
from metrics.feature_stats import Moments, Recipe, Rows, Side, StatRequest, statistics_of
from metrics.frechet import frechet_numbers, warn_few_images
from metrics.inception_score import class_sums, score_numbers
from metrics.kernel import kernel_numbers, subsets
from metrics.mind import mind_numbers
from metrics.precision_recall import DC_NEIGHBOURS, PR_NEIGHBOURS, density_coverage_numbers, precision_recall_numbers
from metrics.registry import HOLDOUT_VALUES, Measurement, register_metric
from metrics.sampling import FAKES, MAX_REALS, NUM_IMAGES, REALS, MetricContext, Part

Reals = Literal["all", "most", "train", "equal", "paired", "none"]
PROTOCOLS: dict[Reals, str] = {  # number of images
    "all": "50,000 fakes or <N>, all reals",
    "most": "50,000 fakes or <N>, all reals up to 200,000",
    "train": "50,000 fakes or <N>, all training images up to 200,000",
    "equal": "50,000 or <N> fakes and as many reals, at most all",
    "paired": "50,000 or <N> fakes, at most as many as there are reals, and as many reals",
    "none": "50,000 fakes or <N>",
}


def no_warnings(*results: object) -> tuple[str, ...]:
    """Return no warnings."""
    return ()


@dataclass(frozen=True, kw_only=True)
class FeatureMetric:
    """A metric on the features of one detector.

    pattern, help, paper, note, values, undirected, clean, library_suffix, higher_is_better    as in MetricSpec
    protocol        processing of the features; the number of images is appended
    role            the detector
    reals           number of reals, a key of PROTOCOLS; `equal` and `paired` include flipped reals under --mirror
    min_sizes       required numbers of reals and fakes
    compares_holdout    with MetricContext.compares_holdout, also compute the HOLDOUT_VALUES
    recipe          Side -> the statistic to compute for that side
    numbers         (statistic of reals, statistic of fakes) -> {name suffix: value}, the main value first;
                    (statistic of fakes) -> the same if `reals` is "none". Collective: equal results on all processes
    clean_numbers   replacement of `numbers` under --protocol=clean
    warnings        same arguments -> warnings for the record
    """

    pattern: str
    help: str
    protocol: str
    paper: str
    role: Role
    reals: Reals
    min_sizes: tuple[int, int] = (0, 0)
    recipe: Callable[[Side], Recipe]
    numbers: Callable[..., dict[str, float]]
    clean_numbers: Callable[..., dict[str, float]] | None = None
    warnings: Callable[..., tuple[str, ...]] = no_warnings
    note: str = ""
    values: tuple[str, ...] = ("",)
    undirected: tuple[str, ...] = ()
    clean: str | None = None
    library_suffix: str = ""
    higher_is_better: bool = False
    compares_holdout: bool = False

    def plan(self, context: MetricContext, count: int | None) -> list[StatRequest]:
        """Return the requested statistics: of reals (unless `reals` is "none"), of fakes, and of `_comparison`."""
        num_fake, total = count or NUM_IMAGES, len(context.reals)
        if self.reals == "paired":
            num_fake = min(num_fake, total)
        limits: dict[Reals, int | None] = {
            "all": None,
            "most": MAX_REALS,
            "train": MAX_REALS,
            "equal": num_fake,
            "paired": num_fake,
            "none": 0,
        }
        limit = limits[self.reals]
        num_real = total if limit is None else min(limit, total)
        for least, size, images in zip(self.min_sizes, (num_real, num_fake), (REALS[context.part], FAKES), strict=True):
            if size < least:
                raise UserError(f"needs at least {least} {images}, got {size}")
        sizes = {"num_real": num_real, "num_fake": num_fake, "seed": context.seed}
        real, fake = (self.recipe(Side(of=of, **sizes)) for of in ("real", "fake"))
        requests = [StatRequest(of="fake", role=self.role, count=num_fake, recipe=fake)]
        if self.reals != "none":
            flips, part = context.has_flips, context.part
            requests.insert(0, StatRequest(of="real", role=self.role, count=limit, recipe=real, flips=flips, part=part))
        return [*requests, *self._comparison(context, real, limit)]

    def _comparison(self, context: MetricContext, recipe: Recipe, limit: int | None) -> list[StatRequest]:
        """Return the statistics of equal numbers of training and held-out images, at most `limit`, if requested."""
        if not (self.compares_holdout and context.compares_holdout):
            return []
        sizes = [len(context.images), len(replace(context, part="holdout").reals)]
        count = min(sizes if limit is None else [*sizes, limit])
        parts: tuple[Part, Part] = ("all", "holdout")
        return [StatRequest(of="real", role=self.role, count=count, recipe=recipe, part=part) for part in parts]

    def measure(self, context: MetricContext, name: str, count: int | None) -> Measurement:
        """Compute the metric from the statistics of `plan`."""
        statistics, requests = statistics_of(context), self.plan(context, count)
        main, compared = (requests[:2], requests[2:]) if self.reals != "none" else (requests, [])
        results = [statistics[request] for request in main]
        sizes = {request.of: statistics.size(request) for request in main}
        numbers = self.clean_numbers if self.clean_numbers and context.setup.protocol == "clean" else self.numbers
        values, warnings = numbers(*results), self.warnings(*results)
        for suffix, request in zip(HOLDOUT_VALUES, compared, strict=False):
            sides = statistics[request], results[1]
            values |= {f"{suffix}{key}": value for key, value in numbers(*sides).items()}
            warnings += self.warnings(*sides)
        return Measurement(
            values={f"{name}{suffix}": value for suffix, value in values.items()},
            num_real=sizes.get("real", 0),
            num_fake=sizes["fake"],
            num_holdout=statistics.size(compared[1]) if compared else 0,
            warnings=tuple(dict.fromkeys(warnings)),
        )


def always(recipe: Recipe) -> Callable[[Side], Recipe]:
    """Return a function that chooses this recipe for either side, regardless of the sizes."""
    return lambda side: recipe


def register_feature_metric(metric: FeatureMetric) -> None:
    """Register a row of METRICS, or a metric defined in another file."""
    register_metric(
        metric.pattern,
        help=metric.help,
        protocol=f"{metric.protocol}; {PROTOCOLS[metric.reals]}",
        paper=metric.paper,
        note=metric.note,
        values=(*metric.values, *(HOLDOUT_VALUES if metric.compares_holdout else ())),
        undirected=metric.undirected,
        roles=(metric.role,),
        plan=metric.plan,
        counts_flips=metric.reals in ("equal", "paired"),
        part="train" if metric.reals == "train" else "all",
        clean=metric.clean,
        library_suffix=metric.library_suffix,
        higher_is_better=metric.higher_is_better,
    )(metric.measure)


FID = FeatureMetric(
    pattern="fid<N>_full",
    help="Frechet inception distance between N fakes and all reals, the usual FID",
    protocol="covariance over N",
    paper="Heusel et al. 2017",
    role="inception",
    reals="all",
    recipe=always(Moments()),
    numbers=frechet_numbers,
    clean_numbers=partial(frechet_numbers, unbiased=True),
    warnings=warn_few_images,
    compares_holdout=True,
    clean="covariance over N-1 (Parmar et al. 2022)",
)
DINO = FeatureMetric(
    pattern="fd<N>_dinov2",
    help="Frechet distance between DINOv2 features of N fakes and all reals",
    note="not on the scale of FID",
    protocol="covariance over N-1",
    paper="Stein et al. 2023",
    role="dinov2",
    reals="all",
    recipe=always(Moments()),
    numbers=partial(frechet_numbers, unbiased=True),
    warnings=warn_few_images,
    compares_holdout=True,
)
KID = FeatureMetric(
    pattern="kid<N>_full",
    help="kernel inception distance between N fakes and all reals, unbiased for small sets",
    note="not multiplied by 1000, as it often is in papers; no deviation if both sets fit into one subset",
    values=("", "_std"),
    undirected=("_std",),
    protocol="100 subsets of at most 1,000",
    paper="Binkowski et al. 2018",
    role="inception",
    reals="all",
    recipe=subsets,
    numbers=kernel_numbers,
    clean="100 subsets of at most 1,000 (Parmar et al. 2022)",
)
KD_DINO = replace(
    KID,
    pattern="kd<N>_dinov2",
    help="kernel distance between DINOv2 features of N fakes and all reals, unbiased for small sets",
    paper="Stein et al. 2023",
    role="dinov2",
    clean=None,
)
MIND = FeatureMetric(
    pattern="mind<N>",
    help="sliced Wasserstein distance between features of N fakes and N reals",
    note="ranks networks with few images; compare only values with equal num_real",
    protocol="1,000 fixed directions",
    paper="Berthet et al. 2026",
    role="inception",
    reals="paired",
    recipe=always(Rows()),
    numbers=mind_numbers,
)
SCORE = FeatureMetric(
    pattern="is<N>",
    help="inception score of N fakes; uses no reals",
    values=("_mean", "_std"),
    undirected=("_std",),
    protocol="class logits (of Inception: 1008, without bias), 10 splits",
    paper="Salimans et al. 2016",
    role="inception",
    reals="none",
    recipe=class_sums,
    numbers=score_numbers,
    higher_is_better=True,
)
PRECISION = FeatureMetric(
    pattern="pr<N>3_full",
    help="precision and recall of N fakes against all reals",
    note=TVGG16,
    values=("_precision", "_recall"),
    protocol="3 neighbours, features and distances in float16",
    paper="Kynkaanniemi et al. 2019",
    role="vgg16",
    reals="most",
    min_sizes=(PR_NEIGHBOURS + 1, PR_NEIGHBOURS + 1),
    recipe=always(Rows(half=True)),
    numbers=precision_recall_numbers,
    library_suffix="_tvgg16",
    higher_is_better=True,
)
DENSITY = FeatureMetric(
    pattern="dc<N>_full",
    help="density and coverage of N fakes against all reals",
    note=TVGG16,
    values=("_density", "_coverage"),
    protocol="5 neighbours, distances in float32",
    paper="Naeem et al. 2020",
    role="vgg16",
    reals="most",
    min_sizes=(DC_NEIGHBOURS + 1, 1),
    recipe=always(Rows()),
    numbers=density_coverage_numbers,
    library_suffix="_tvgg16",
    higher_is_better=True,
)
AUTHENTICITY = FeatureMetric(
    pattern="authpct<N>",
    help="percentage of N fakes that are authentic: no copies of training images",
    note="a fake is authentic if its nearest training image is nearer to another training image than to the fake",
    protocol="distances in float32",
    paper="Alaa et al. 2022, Stein et al. 2023",
    role="inception",
    reals="train",
    min_sizes=(2, 1),
    recipe=always(Rows()),
    numbers=authenticity_numbers,
    higher_is_better=True,
)
METRICS = (
    FID,
    replace(FID, pattern="fid<N>", reals="equal", help="Frechet inception distance between N fakes and N reals"),
    DINO,
    KD_DINO,
    KID,
    replace(KID, pattern="kid<N>", reals="equal", help="kernel inception distance between N fakes and N reals"),
    MIND,
    SCORE,
    PRECISION,
    replace(PRECISION, pattern="pr<N>3", reals="equal", help="precision and recall of N fakes against N reals"),
    DENSITY,
    replace(DENSITY, pattern="dc<N>", reals="equal", help="density and coverage of N fakes against N reals"),
    AUTHENTICITY,
    replace(AUTHENTICITY, pattern="authpct<N>_dinov2", role="dinov2"),
)

for _metric in METRICS:
    register_feature_metric(_metric)
