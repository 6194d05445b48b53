"""network-ema-<sigma>-<kimg>.pt: power-function averages of a run, and averages of other lengths rebuilt from them.

Karras et al. 2024, section 3.2: the profiles p_i of the files are combined into the wanted profile p,

    p ~ sum_i x_i p_i,    A x = b,    A_ij = <p_i, p_j>,    b_i = <p_i, p>,    then x / sum(x),

where the inner product <p, q> is the integral of p(tau) q(tau) over the images tau. The same x combines the weights.
The residual ||sum_i x_i p_i - p|| / ||p|| is known before any weight is read. It is the expected relative error of
weights that are independent at every step; weights of a real run change slowly, so their error is smaller.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.config import UserError
from torch_utils.checkpoint import Migration, copy_to_cpu, read_document, write_file
from torch_utils.misc import is_finite
from training.power_ema import MAX_SIGMA, MIN_SIGMA, PowerEMA, gamma_of
from training.snapshots.snapshot import MAX_IMAGES, Snapshot

FORMAT = "network-ema"
VERSION = 1
MIGRATIONS: Mapping[int, Migration] = {}
FILE_NAME = re.compile(r"network-ema-0\.\d{3}-(\d+)\.pt")
MAX_ERROR = 0.02  # limit of the residual and of the error by rounding
ROUNDING = 2**-12  # about the root mean square of the relative rounding errors of float16
MAX_EXPONENT = 126  # 2^-126 is the smallest normal float32 number
GRID = np.arange(1, 281) / 1000  # lengths that are tried for an error message


def file_name(sigma: float, nimg: int) -> str:
    """Return the name of the file of an average after `nimg` images."""
    return f"network-ema-{sigma:.3f}-{nimg // 1000:06d}.pt"


def list_files(folder: Path) -> dict[Path, int]:
    """Return the files of averages in a folder with the kimg in their names, oldest first."""
    names = ((path, FILE_NAME.fullmatch(path.name)) for path in folder.glob("network-ema-*.pt"))
    found = {path: int(match[1]) for path, match in names if match and path.is_file()}
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def to_half(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return float16 tensors x / 2^e and the exponents e (n,), with the largest |x| / 2^e of a tensor in [0.5, 1).

    Values of any magnitude fit into float16 in this way; the relative rounding error of a value is at most 2^-11, down
    to 2^-14 of the largest value of its tensor.
    """
    peaks = torch.stack(torch._foreach_norm(list(tensors), torch.inf))
    exponents = torch.frexp(peaks).exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    scales = torch.ldexp(torch.ones_like(peaks), -exponents)
    return [x.half() for x in torch._foreach_mul(list(tensors), list(scales.unbind()))], exponents


def capture(averages: PowerEMA, sigma: float, nimg: int, batch_size: int) -> dict[str, Any]:
    """Return a copy of an average as the content of a file, which can be written while training continues."""
    halves, exponents = to_half(averages.averages[sigma])
    metadata = {"sigma": sigma, "nimg": nimg, "batch_size": batch_size, "run": averages.run}
    parameters = dict(zip(averages.names, halves, strict=True))
    content: dict[str, Any] = copy_to_cpu({**metadata, "exponents": exponents, "parameters": parameters})
    return content


def write(path: Path, payload: dict[str, Any]) -> None:
    """Write the return value of `capture`. Raises WriteError."""
    write_file(path, FORMAT, VERSION, payload)


@dataclass(frozen=True)
class Average:
    """A file of an average: its relative width, the images seen, and the run it belongs to."""

    path: Path
    sigma: float
    nimg: int
    run: str


@dataclass(frozen=True)
class Plan:
    """Weights x of the files that combine into the average of width `sigma` after `nimg` images."""

    sigma: float
    nimg: int
    files: tuple[Average, ...]
    weights: tuple[float, ...]
    residual: float

    @property
    def rounding(self) -> float:
        """Expected relative error of the weights by float16 in the files, which the combination amplifies."""
        return rounding_of(np.array(self.weights))

    def __str__(self) -> str:
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return (
            f"EMA {self.sigma:g} from {files}: residual {self.residual * 100:.1f} %, "
            f"float16 rounding {self.rounding * 100:.2g} %"
        )


def correlate(gamma_a: Any, t_a: Any, gamma_b: Any, t_b: Any) -> Any:
    """Return the inner products <p_a, p_b> of profiles (Karras et al. 2024, appendix C); the arguments broadcast."""
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def solve(
    sigmas: Sequence[float], nimgs: Sequence[int], wanted: Sequence[float] | np.ndarray, nimg: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights x (n, k), with sum 1, that combine n profiles into k wanted ones at `nimg` images.

    Also return the relative residuals (k,).
    """
    t = np.array(nimgs, dtype=np.float64)[:, None] / nimg
    gammas = np.array([gamma_of(sigma) for sigma in sigmas])[:, None]
    targets = np.array([gamma_of(sigma) for sigma in wanted])
    A = correlate(gammas, t, gammas.T, t.T)
    b = correlate(gammas, t, targets, 1.0)
    x = np.linalg.lstsq(A, b, rcond=None)[0]
    x /= x.sum(axis=0)
    squares = correlate(targets, 1.0, targets, 1.0)
    errors = (x * (A @ x - 2 * b)).sum(axis=0) + squares
    return x, np.sqrt(errors.clip(min=0) / squares)


def rounding_of(x: np.ndarray) -> Any:
    """Return the relative error (k,) of weights combined with the factors x (n, k) from float16 values.

    Independent roundings of the files add up to the norm of x, equal ones (of constant weights) to its sum, 1.
    """
    return ROUNDING * np.sqrt((x**2).sum(axis=0)).clip(min=1)


def plan(snapshot: Snapshot, sigma: float) -> Plan:
    """Plan the average of width `sigma` at the images seen of a snapshot, from the files beside the snapshot.

    A file of this width and number of images is used as it is. Raises UserError for an invalid width, without files,
    for a corrupt file, for files of several runs, and for an error above MAX_ERROR.
    """
    if not MIN_SIGMA <= sigma <= MAX_SIGMA:
        problem = f"must be from {MIN_SIGMA:g} to {MAX_SIGMA:g}; a uniform average over the run would have 0.289"
        raise UserError(f"--ema={sigma:g}: {problem}")
    tracked = snapshot.path.parent / file_name(sigma, snapshot.nimg)
    if tracked.is_file():
        file = _read_header(tracked)
        if (file.sigma, file.nimg) == (sigma, snapshot.nimg):
            _check_run(file, _neighbours(file))
            return Plan(sigma, snapshot.nimg, (file,), (1.0,), 0.0)
    files = _files_of(snapshot)
    x, residuals = solve([file.sigma for file in files], [file.nimg for file in files], [sigma], snapshot.nimg)
    found = Plan(sigma, snapshot.nimg, tuple(files), tuple(x[:, 0].tolist()), float(residuals[0]))
    if max(found.residual, found.rounding) > MAX_ERROR:
        raise UserError(_explain(found))
    return found


def _explain(plan: Plan) -> str:
    """Return the message for a width that cannot be rebuilt."""
    sigmas = [file.sigma for file in plan.files]
    x, residuals = solve(sigmas, [file.nimg for file in plan.files], GRID, plan.nimg)
    lengths = _describe(GRID, np.maximum(residuals, rounding_of(x)) <= MAX_ERROR)
    profiles = ",".join(f"{sigma:g}" for sigma in sorted({*sigmas, round(plan.sigma, 3)}))
    return (
        f"--ema={plan.sigma:g}: cannot be rebuilt from the {len(plan.files)} files network-ema-*.pt up to kimg "
        f"{plan.nimg / 1000:g}: residual {plan.residual * 100:.2g} %, float16 rounding {plan.rounding * 100:.2g} %, "
        f"limit {MAX_ERROR * 100:g} %. These files give {lengths}; for others, train with more snapshots (--snap) or "
        f"with --set ema.profiles={profiles}"
    )


def _describe(lengths: np.ndarray, is_possible: np.ndarray) -> str:
    """Return the ranges of possible lengths as text, e.g. `the lengths 0.041 to 0.214`."""
    ends = np.flatnonzero(np.diff(is_possible, prepend=False, append=False)).reshape(-1, 2)
    ranges = [f"{lengths[first]:g}" + (f" to {lengths[end - 1]:g}" if end > first + 1 else "") for first, end in ends]
    return f"the lengths {', '.join(ranges)}" if ranges else "no other length"


def rebuild(snapshot: Snapshot, plans: Sequence[Plan]) -> list[Snapshot]:
    """Return the snapshot with the parameters of G_ema replaced, for each plan. Reads each file once.

    The sums are float64. Raises UserError for a corrupt file, and for files of another network.
    """
    G = snapshot.G_ema
    shapes = {name: x.shape for name, x in G.named_parameters()}
    sums = [{name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()} for _ in plans]
    weights = [{file.path: x for file, x in zip(each.files, each.weights, strict=True)} for each in plans]
    for path in dict.fromkeys(path for files in weights for path in files):
        content = read(path)
        _check_shapes(path, content["parameters"], shapes)
        scales = torch.exp2(content["exponents"].double())
        for scale, (name, x) in zip(scales.tolist(), content["parameters"].items(), strict=True):
            for total, files in zip(sums, weights, strict=True):
                if path in files:
                    total[name].add_(x.double(), alpha=scale * files[path])
    return [replace(snapshot, G_ema=_with_parameters(G, total)) for total in sums]


@torch.no_grad()
def _with_parameters(G: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    network = copy.deepcopy(G)
    for name, x in network.named_parameters():
        x.copy_(parameters[name])
    return network


def _files_of(snapshot: Snapshot) -> list[Average]:
    """Return the averages of a snapshot's run up to its number of images.

    Raises UserError if there are none, none with the same number of images, or averages of another run.
    """
    paths = [path for path, kimg in list_files(snapshot.path.parent).items() if kimg <= snapshot.nimg // 1000]
    files = sorted((x for x in map(_read_header, paths) if x.nimg <= snapshot.nimg), key=lambda x: x.nimg)
    if not files:
        raise UserError(
            f"--ema: {snapshot.path}: no files network-ema-*.pt up to kimg {snapshot.kimg:g} are in its folder; a "
            "run with ema.profiles writes them at every snapshot after the first: give a snapshot in the folder of one"
        )
    if files[-1].nimg != snapshot.nimg:
        raise UserError(
            f"--ema: {snapshot.path}: no file network-ema-*.pt of kimg {snapshot.kimg:g} is in its folder, the newest "
            f"before is {files[-1].path.name}: give the snapshot of kimg {files[-1].nimg / 1000:g}"
        )
    _check_run(files[-1], files)
    return files


def _neighbours(file: Average) -> list[Average]:
    """Return the other averages of the same kimg."""
    kimg = file.nimg // 1000
    return [_read_header(path) for path, at in list_files(file.path.parent).items() if at == kimg and path != file.path]


def _check_run(file: Average, others: Sequence[Average]) -> None:
    """Raise UserError for the first of `others` that belongs to another run than `file`."""
    for other in others:
        if other.run != file.run:
            raise UserError(f"{other.path}: belongs to another run than {file.path.name}; move it to its run's folder")


def _read_header(path: Path) -> Average:
    stat = path.stat()
    return _cached_header(path, (stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=10_000)
def _cached_header(path: Path, version: tuple[int, int]) -> Average:
    content = read(path)
    return Average(path, content["sigma"], content["nimg"], content["run"])


def read(path: Path) -> dict[str, Any]:
    """Return the content of a file. Raises UserError naming the file if it is corrupt."""
    content: dict[str, Any] = read_document(path, FORMAT, VERSION, MIGRATIONS)["payload"]
    sigma, nimg, run, exponents, parameters = (
        content.get(name) for name in ("sigma", "nimg", "run", "exponents", "parameters")
    )
    is_valid = {
        "sigma": isinstance(sigma, float) and MIN_SIGMA <= sigma <= MAX_SIGMA,
        "nimg": type(nimg) is int and 0 < nimg < MAX_IMAGES,
        "run": isinstance(run, str),
        "parameters": isinstance(parameters, dict)
        and all(isinstance(x, Tensor) and x.dtype == torch.float16 for x in parameters.values()),
        "exponents": isinstance(exponents, Tensor)
        and exponents.dtype == torch.int32
        and isinstance(parameters, dict)
        and exponents.shape == (len(parameters),),
    }
    for name in is_valid:
        if not is_valid[name]:
            raise UserError(f"{path}: {name} is not valid in an average; use another copy")
    return content


def _check_shapes(path: Path, parameters: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    if {name: x.shape for name, x in parameters.items()} != dict(shapes):
        raise UserError(
            f"{path}: contains the parameters of another network than the snapshot; move it to its run's folder"
        )
    for name, x in parameters.items():
        if not is_finite(x):
            raise UserError(f"{path}: {name} contains non-finite values: training had already failed")
