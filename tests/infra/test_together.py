"""One cluster out of several machines, started for one command: real Rays on this machine, and a stand-in for Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.infra.conftest import ROOT, Start
from tests.seaweedfs import free_ports

TOGETHER = ROOT / "infra" / "ray" / "together.sh"
SLURM = ROOT / "infra" / "slurm" / "mergeyard.sbatch"
HOST = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's address in the network

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has 127.0.0.2 without being asked")

JOB = """\
name: grid
parents: {{long: {parents}/long, fmt: {parents}/fmt}}
recipe:
  merge_method: linear
  models:
    - {{model: long, parameters: {{weight: "${{w}}"}}}}
    - {{model: fmt, parameters: {{weight: "${{1 - w}}"}}}}
grid: {{w: [0.25, 0.5, 0.75]}}
workers: {{cpus: 1, memory: 4GB, count: 1}}
output: {output}
"""

HOSTNAME = f"#!/bin/sh\necho {HOST} 10.0.0.1\n"
SRUN = """\
#!/bin/bash
# as srun: the command on both nodes, the worst exit code
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=1 "$@" & worker=$!
SLURM_PROCID=0 "$@"; head=$?
wait $worker || exit $?
exit $head
"""
SCONTROL = '#!/bin/sh\necho "scontrol $*"\n'


@pytest.mark.heavy
def test_the_command_sees_all_machines_and_its_exit_code_is_rank_noughts(start: Start) -> None:
    head = f"{HOST}:{free_ports(1)[0]}"
    script = "import ray, sys; ray.init('auto'); print('machines:', len(ray.nodes())); sys.exit(3)"
    worker = start(TOGETHER, "1", "2", head, "true")
    first = start(TOGETHER, "0", "2", head, "python", "-c", script)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 3, said
    assert "machines: 2" in said
    began = time.monotonic()
    worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert time.monotonic() - began < 40  # the head's end is noticed


def stand_in(folder: Path, **programs: str) -> dict[str, str]:
    """The environment of a job of Slurm, with these programs before all others."""
    for name, text in {"hostname": HOSTNAME, "scontrol": SCONTROL, **programs}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}


def test_where_all_are_told_to_end_the_exit_code_is_still_the_commands(start: Start, tmp_path: Path) -> None:
    """Without a Ray: what is asked is the script's own end."""
    (tmp_path / "environment.sh").touch()
    shutil.copy(TOGETHER, tmp_path)
    programs = stand_in(tmp_path, ray="#!/bin/sh\nexec sleep 600\n", python3="#!/bin/sh\n")
    script = "trap 'sleep 1; exit 75' TERM; echo begun; while true; do sleep 0.1; done"
    alone = start(tmp_path / "together.sh", "0", "1", f"{HOST}:1", "bash", "-c", script, **programs)
    assert alone.stdout is not None and alone.stdout.readline() == "begun\n"
    os.killpg(alone.pid, signal.SIGTERM)
    assert alone.wait(60) == 75


@pytest.mark.heavy
def test_a_job_of_slurm_runs_on_all_its_nodes(start: Start, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.format(parents=ROOT / "jobs" / "examples" / "parents", output=tmp_path))
    ended = start("bash", SLURM, tmp_path / "job.yaml", **stand_in(tmp_path, srun=SRUN))
    said, _ = ended.communicate(timeout=200)
    assert ended.returncode == 0, said
    assert "3 points in" in said
    assert len(list(tmp_path.glob("grid/points/*/manifest.json"))) == 3
    assert "scontrol" not in said


@pytest.mark.parametrize(("code", "put_back"), [(0, False), (1, False), (2, False), (75, True)])
def test_a_job_of_slurm_is_put_back_at_75_alone(start: Start, tmp_path: Path, code: int, put_back: bool) -> None:
    ended = start("bash", SLURM, "job.yaml", **stand_in(tmp_path, srun=f"#!/bin/sh\nexit {code}\n"))
    said, _ = ended.communicate(timeout=30)
    assert ended.returncode == code, said
    assert ("scontrol requeue 7" in said) == put_back


STEP = """\
#!/bin/bash
# as a step that is told to end, and then ends so
trap 'exit {code}' TERM
echo $$ > {folder}/step
while true; do sleep 0.1; done
"""
SCANCEL = '#!/bin/sh\necho "scancel $*"\nkill -TERM $(cat {folder}/step)\n'


@pytest.mark.parametrize(("code", "put_back"), [(75, True), (143, True), (0, False), (1, False)])
def test_a_job_of_slurm_whose_time_is_up_ends_its_step_and_is_put_back(
    start: Start, tmp_path: Path, code: int, put_back: bool
) -> None:
    programs = {"srun": STEP.format(code=code, folder=tmp_path), "scancel": SCANCEL.format(folder=tmp_path)}
    ended = start("bash", SLURM, "job.yaml", **stand_in(tmp_path, **programs))
    deadline = time.monotonic() + 60
    while not (tmp_path / "step").exists() or not (tmp_path / "step").read_text():
        assert time.monotonic() < deadline, "the step never began"
        time.sleep(0.05)
    ended.send_signal(signal.SIGTERM)  # Slurm tells the script alone, by --signal=B:TERM@90
    said, _ = ended.communicate(timeout=60)
    assert ended.returncode == code, said
    assert "scancel --signal=TERM 7" in said
    assert ("scontrol requeue 7" in said) == put_back


def test_without_a_token_nothing_is_started(start: Start) -> None:
    done = start("env", "--unset=RAY_AUTH_TOKEN", TOGETHER, "0", "1", f"{HOST}:1", "true")
    said, _ = done.communicate(timeout=30)
    assert done.returncode == 1
    assert "set RAY_AUTH_TOKEN" in said
