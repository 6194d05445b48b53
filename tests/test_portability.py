"""Training without the POSIX features that Windows lacks. (Windows itself is untested.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import PATIENCE, SMALL

# Removed: os.pread, SIGUSR1, SIGKILL, the modules resource and fcntl, and fork; workers are spawned.
WITHOUT = """
import multiprocessing, os, signal, sys
import torch, torch.distributed, torch.utils.data
for owner, names in ((os, ("pread", "fork", "sched_getaffinity")), (signal, ("SIGUSR1", "SIGKILL", "SIGHUP"))):
    for name in names:
        delattr(owner, name)
sys.modules["resource"] = sys.modules["fcntl"] = None
import train
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    train.main()
"""


def test_training_works_without_posix_features(shapes_zip: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WITHOUT)
    options = [*SMALL, "--device=cpu", "--tick=0.016", "--kimg=0.032", "--metrics=none", "--log=none", "--workers=1"]
    command = [sys.executable, str(program), f"--data={shapes_zip}", f"--outdir={tmp_path}", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}  # the project need not be installed
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (run_dir,) = tmp_path.glob("0*")
    assert "has no locks (no fcntl)" in done.stderr
    last = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])
    assert last["Progress/kimg"] == 0.032
    assert "Resources/cpu_mem_gb" not in last
    assert (run_dir / "training-state-000000.pt").exists()
