"""Scripts of examples/: their options exist, and they start, stop and requeue training."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PATIENCE
from torch.distributed.run import get_args_parser

import train

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").iterdir())

# Long options of sbatch in the manual of Slurm 24.05, as far as examples may use them.
SBATCH = {
    "account", "array", "chdir", "comment", "constraint", "cpus-per-gpu", "cpus-per-task", "dependency", "error",
    "exclude", "exclusive", "export", "gpus", "gpus-per-node", "gpus-per-task", "gres", "job-name", "mail-type",
    "mail-user", "mem", "mem-per-cpu", "mem-per-gpu", "nodelist", "nodes", "no-requeue", "ntasks", "ntasks-per-node",
    "open-mode", "output", "partition", "qos", "requeue", "reservation", "signal", "time", "wait-all-nodes",
}  # fmt: skip

# Replacements of programs. Tasks stop on SIGTERM a second later, as after the write of a training state.
STUBS = {
    "torchrun": 'printf "%s\\n" "$@" >"$RECORD/torchrun"',
    "scancel": 'echo "scancel $*" >>"$RECORD/events"; kill -TERM "$(cat "$RECORD/srun")"',
    "scontrol": 'if [ "$1" = show ]; then echo a1; echo a2; else echo "scontrol $*" >>"$RECORD/events"; fi',
    "srun": """
        stop() { sleep 1; echo saved >>"$RECORD/events"; exit 1; }
        trap stop TERM
        printf "%s\\n" "$@" >"$RECORD/arguments"
        echo $$ >"$RECORD/srun.part"
        mv "$RECORD/srun.part" "$RECORD/srun"
        while [ ! -e "$RECORD/end" ]; do sleep 0.05; done
        exit "$(cat "$RECORD/end")"
    """,
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment with the replacements of programs, which write what they do to the folder $RECORD."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STUBS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "32"}
    return {**os.environ, **slurm, "PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(tmp_path)}


def torchrun_command(script: Path) -> list[str]:
    """Return the words after `torchrun` in a script."""
    text = re.sub(r"\\\n", " ", script.read_text())
    (line,) = re.findall(r"^[^#\n]*\btorchrun (.*?)(?: &)?$", text, re.MULTILINE)
    return shlex.split(line)


def check_torchrun(words: list[str]) -> list[str]:
    """Let torchrun's parser read the words; return the options of train.py, which must exist."""
    parsed = get_args_parser().parse_args(words)
    assert parsed.training_script == "train.py"
    options: list[str] = parsed.training_script_args
    known = {flag for option in train.main.params for flag in option.opts}
    assert {word.partition("=")[0] for word in options} <= known
    return options


def test_the_folder_has_three_scripts() -> None:
    assert [script.name for script in SCRIPTS] == ["one_machine.sh", "several_machines.sh", "slurm.sbatch"]
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert bool(script.stat().st_mode & 0o111) == (script.suffix == ".sh")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_options_of_an_example_exist(script: Path) -> None:
    words = [re.sub(r"\$\{?\w+[^ }]*\}?", "1", word) for word in torchrun_command(script) if word != "$@"]
    assert check_torchrun(words) == ["--outdir=runs", "--resume=latest"]
    usage = [line for line in script.read_text().splitlines() if line.startswith("#     ")]
    (given,) = (re.findall(r"--[\w-]+", line) for line in usage)
    assert {*given} <= {flag for option in train.main.params for flag in option.opts}


def test_the_directives_of_the_slurm_job_are_known() -> None:
    lines = (ROOT / "examples" / "slurm.sbatch").read_text().splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    options = dict(lines[i].removeprefix("#SBATCH --").partition("=")[::2] for i in directives)
    assert {*options} <= SBATCH
    assert len(options) == len(directives)
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(directives) < first_command  # sbatch ignores later ones
    notice = int(options["signal"].removeprefix("B:USR1@"))
    (timeout,) = (word for word in torchrun_command(ROOT / "examples" / "slurm.sbatch") if "shutdown-timeout" in word)
    assert int(timeout.partition("=")[2]) <= notice / 2


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        ("one_machine.sh", {}, ["--standalone", "--nproc-per-node=gpu"]),
        ("one_machine.sh", {"GPUS": "1"}, ["--standalone", "--nproc-per-node=1"]),
        (
            "several_machines.sh",
            {"FIRST": "a1", "MACHINES": "3", "GPUS": "8"},
            ["--nnodes=3", "--nproc-per-node=8", "--rdzv-endpoint=a1:29500"],
        ),
    ],
)
def test_a_script_starts_torchrun(
    script: str, variables: dict[str, str], expected: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    command = [str(ROOT / "examples" / script), "--data=my images.zip", "--cfg=auto"]
    subprocess.run(command, cwd=tmp_path, env=environment | variables, check=True)
    words = (tmp_path / "torchrun").read_text().splitlines()
    assert {*expected} <= {*words}
    assert check_torchrun(words) == ["--outdir=runs", "--resume=latest", "--data=my images.zip", "--cfg=auto"]


def test_several_machines_need_the_name_of_the_first(environment: dict[str, str]) -> None:
    command = [str(ROOT / "examples" / "several_machines.sh")]
    result = subprocess.run(command, env=environment | {"MACHINES": "2"}, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "FIRST: unbound variable" in result.stderr


@pytest.fixture
def job(environment: dict[str, str], tmp_path: Path) -> subprocess.Popen[bytes]:
    """Start the Slurm job, and wait until its tasks run."""
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    command = ["bash", str(ROOT / "examples" / "slurm.sbatch"), "--data=a.zip"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    while not (tmp_path / "srun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_the_slurm_job_requeues_itself_after_the_state(job: subprocess.Popen[bytes], tmp_path: Path) -> None:
    job.send_signal(signal.SIGUSR1)
    job.wait(PATIENCE)
    assert (tmp_path / "events").read_text().splitlines() == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]
    words = (tmp_path / "arguments").read_text().splitlines()
    assert words[:2] == ["--cpus-per-task=32", "torchrun"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-id=7", "--rdzv-endpoint=a1:29500"} <= {*words}
    assert check_torchrun(words[2:]) == ["--outdir=runs", "--resume=latest", "--data=a.zip"]


@pytest.mark.parametrize("code", [0, 1])
def test_a_finished_slurm_job_ends_with_the_code_of_its_tasks(
    code: int, job: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    part = tmp_path / "end.part"
    part.write_text(str(code))
    part.rename(tmp_path / "end")
    assert job.wait(PATIENCE) == code
    assert not (tmp_path / "events").exists()
