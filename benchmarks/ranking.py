"""Compare the rankings of two metrics: Kendall's tau over the snapshots of a run, or over the trials of a laboratory.

\b
python calc_metrics.py --network=runs/00000-run --metrics=mind2k,fid10k_full --detector=features.pt2
python benchmarks/ranking.py runs/00000-run --metrics=mind2k_features,fid10k_full_features
python benchmarks/ranking.py runs/what-helps --metrics=mind2k_features,fid10k_full_features

RUN is the folder of a run or of benchmarks/learning.py. Prints a line of JSON with tau and its 95 % interval; tau is 1
for equal rankings, from the best network to the worst, and 0 for independent ones. The interval takes the networks for
independent. Snapshots of one run are not: any two metrics that improve with training rank them alike.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from common import emit

from dnnlib.cli import NameList, Script, option
from dnnlib.config import UserError
from reporting.charts import higher_is_better
from reporting.intervals import MIN_PAIRS, kendall_interval
from reporting.laboratory import LABORATORY_FILE, read_laboratory
from reporting.run_reader import find_runs, read_run

Ranked = dict[tuple[str, float], float]  # values by (name of the run, kimg)


@click.command(cls=Script, help=__doc__)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@option("--metrics", type=NameList(), required=True, metavar="NAME,NAME", help="The two metrics, as recorded.")
def main(run: Path, metrics: tuple[str, ...]) -> None:
    if len(metrics) != 2:
        raise UserError(f"--metrics={','.join(metrics)}: specify two metrics, e.g. mind2k,fid10k_full")
    values = [read_values(run, name) for name in metrics]
    shared = [key for key in values[0] if key in values[1]]
    if len(shared) < MIN_PAIRS:
        counts = " and ".join(f"{len(own)} values of {name}" for own, name in zip(values, metrics, strict=True))
        raise UserError(
            f"{run}: has {counts}, {len(shared)} of them of the same networks; the interval needs at least {MIN_PAIRS}"
        )
    signs = [-1 if higher_is_better(name) else 1 for name in metrics]
    first, second = ([sign * own[key] for key in shared] for sign, own in zip(signs, values, strict=True))
    tau = kendall_interval(first, second)
    result = {
        "benchmark": "ranking",
        "metrics": metrics,
        "networks": len(shared),
        "tau": round(tau.estimate, 3),
        "low": round(tau.low, 3),
        "high": round(tau.high, 3),
    }
    emit(result, torch.device("cpu"))


def read_values(path: Path, metric: str) -> Ranked:
    """Return the values of a metric: of all snapshots of a run, or of the last snapshot of each trial."""
    if (path / LABORATORY_FILE).is_file():
        trials = [trial for trial in read_laboratory(path).trials if metric in trial.metrics]
        last = {f"{trial.arm} {trial.seed}": trial.metrics[metric] for trial in trials}
        return {(name, own.kimg[-1]): own.values[-1] for name, own in last.items()}
    runs = [read_run(folder, folder.name) for folder in find_runs([path])]
    curves = {run.name: run.metrics[metric] for run in runs if metric in run.metrics}
    return {
        (name, kimg): value
        for name, curve in curves.items()
        for kimg, value in zip(curve.kimg.tolist(), curve.values.tolist(), strict=True)
    }


if __name__ == "__main__":
    main()
