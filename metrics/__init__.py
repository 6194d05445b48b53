"""Metrics that compare a generator with a dataset. Importing this package imports every module in the folder."""

from importlib import import_module
from pkgutil import iter_modules

from metrics.registry import (
    Measurement,
    MetricResult,
    MetricSpec,
    append_result,
    check_available,
    compute,
    default_metrics,
    register_metric,
    registered_metrics,
    resolve,
    result_to_json,
    to_line,
)
from metrics.sampling import ImageGenerator, Images, MetricContext

__all__ = [
    "ImageGenerator",
    "Images",
    "Measurement",
    "MetricContext",
    "MetricResult",
    "MetricSpec",
    "append_result",
    "check_available",
    "compute",
    "default_metrics",
    "register_metric",
    "registered_metrics",
    "resolve",
    "result_to_json",
    "to_line",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
