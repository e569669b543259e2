"""Merges from and to a real S3 server (SeaweedFS on loopback), and watches that no parent ever lies on the local disk.

    python -m tests.benchmarks.merge_from_s3 PARENTS [--points 1] [--workers 2]

PARENTS holds cos and fmt, as make_checkpoints.py writes them. They are uploaded first (not timed). Prints the wall time
of `mergeyard run`, the bytes read by receipts, and the most that was written outside the server's folder meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.seaweedfs import SeaweedFS

JOB = """
name: from-s3
parents: {{cos: s3://models/cos, fmt: s3://models/fmt}}
recipe:
  merge_method: linear
  models:
    - {{model: cos, parameters: {{weight: "${{w}}"}}}}
    - {{model: fmt, parameters: {{weight: "${{1 - w}}"}}}}
  dtype: bfloat16
grid: {{w: {axis}}}
point: "w{{w}}"
output: s3://models/runs
workers: {{count: {workers}}}
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("parents", type=Path)
    arguments.add_argument("--points", type=int, default=1)
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="merge-from-s3-", dir=options.parents.resolve().parent))
    server = SeaweedFS(scratch / "server")
    try:
        server.start()
        client = server.client()
        client.create_bucket(Bucket="models")
        for name in ("cos", "fmt"):
            for path in (options.parents / name).iterdir():
                client.upload_file(str(path), "models", f"{name}/{path.name}")
        local = scratch / "local"
        local.mkdir()
        axis = "[0.7]" if options.points == 1 else f"{{from: 0.2, to: 0.8, num: {options.points}}}"
        (local / "job.yaml").write_text(JOB.format(axis=axis, workers=options.workers))
        watch = _Watch(local)
        started = time.perf_counter()
        command = [sys.executable, "-m", "orchestrator.cli", "run", "--json", str(local / "job.yaml")]
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "TMPDIR": str(local),
            "HOME": str(local),
        }
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
        result = json.loads(done.stdout)
        print(
            f"{options.points} points: {seconds:.1f} s, {result['bytes_read'] / 1e9:.2f} GB read,"
            f" at most {watch.most() / 1e6:.1f} MB on the local disk"
        )
    finally:
        server.kill()
        shutil.rmtree(scratch, ignore_errors=True)


class _Watch:
    """The most that a folder ever held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.2):
            size = 0
            for folder, _, names in os.walk(self._folder):
                for name in names:
                    try:
                        size += Path(folder, name).stat().st_blocks * 512
                    except OSError:
                        continue
            self._most = max(self._most, size)

    def most(self) -> int:
        """Bytes on disk, sampled five times a second."""
        self._stop.set()
        self._thread.join()
        return self._most


if __name__ == "__main__":
    main()
