"""Two nodes, simulated by two torchrun agents on one machine."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL
from process_helpers import ENVIRONMENT, ROOT, Program, run_result

pytestmark = pytest.mark.slow

OPTIONS = [*SMALL, "--batch=8", "--tick=0.016", "--snap=2", "--metrics=none", "--device=cpu", "--resume=latest"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


# Workers divide the cores of the machine among their threads, and results are bit-identical only for equal thread
# counts. On one core, every worker has one thread.
ON_ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(arguments: list[str], output: Path) -> Program:
    """Start Python with these arguments on one core."""
    command = [sys.executable, "-c", ON_ONE_CORE, *arguments]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Program(process, output)


def start_agents(outdir: Path, data: Path, kimg: float) -> list[Program]:
    agent = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--local-addr=localhost", "train.py"]
    command = [*agent, f"--outdir={outdir}", f"--data={data}", f"--kimg={kimg}", *OPTIONS]
    return [start(command, outdir.with_suffix(f".{number}.txt")) for number in (0, 1)]


def test_two_nodes_equal_one_node_with_two_workers(shapes_zip: Path, tmp_path: Path) -> None:
    """A signal to one node stops both nodes; the same commands then resume the run."""
    agents = start_agents(tmp_path / "two", shapes_zip, kimg=99)
    try:
        while not any("tick 1 " in agent.output.read_text() for agent in agents):
            assert all(agent.process.poll() is None for agent in agents), agents[0].output.read_text()
        agents[1].process.send_signal(signal.SIGTERM)
        assert [agent.finish() for agent in agents] == [1, 1]  # torchrun's own exit code
    finally:
        for agent in agents:
            agent.kill()
    printed = "".join(agent.output.read_text() for agent in agents)
    assert printed.count("SIGTERM at kimg") == printed.count("Stopped; --resume=latest resumes this run") == 1
    (run_dir,) = (tmp_path / "two").iterdir()
    assert (run_dir / "training-state-000000.pt").exists()

    stopped = float(printed.partition("SIGTERM at kimg ")[2].partition(":")[0])
    kimg = stopped + 0.048
    agents = start_agents(tmp_path / "two", shapes_zip, kimg)
    try:
        assert [agent.finish() for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    command = ["train.py", f"--outdir={tmp_path / 'one'}", f"--data={shapes_zip}", "--gpus=2"]
    straight = start([*command, f"--kimg={kimg}", *OPTIONS], tmp_path / "one.txt")
    assert straight.finish() == 0
    ours, theirs = run_result(tmp_path / "two"), run_result(tmp_path / "one")
    assert ours["parts"] == theirs["parts"]
