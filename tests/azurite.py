"""A real Azure Blob server for tests: Azurite, of the npm package of this name, in one process on the loopback."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import shutil
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

from tests.seaweedfs import free_ports

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, published with it."""
VERSION = "2021-08-06"
READY_SECONDS = 60


class Azurite:
    """`endpoint` is for AZURE_STORAGE_ENDPOINT; everything is in memory."""

    def __init__(self, binary: str) -> None:
        (self._port,) = free_ports(1)
        self._binary = binary
        self.endpoint = f"http://127.0.0.1:{self._port}/{ACCOUNT}"

    def start(self) -> None:
        command = [self._binary, "--blobHost=127.0.0.1", f"--blobPort={self._port}", "--silent"]
        command += ["--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def create_container(self, name: str) -> None:
        """Waits for the server, then makes a container with one signed request (Shared Key)."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                status = self._create(name)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                assert status == 201, status
                return

    def _create(self, name: str) -> int:
        date = formatdate(usegmt=True)
        signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{VERSION}\n"
        signed += f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
        headers = {"x-ms-date": date, "x-ms-version": VERSION}
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        connection.request("PUT", f"/{ACCOUNT}/{name}?restype=container", headers=headers)
        return connection.getresponse().status


def azurite_binary() -> str | None:
    """Where `make azurite` puts it, or on the path."""
    beside = Path(sys.executable).parents[1] / "azurite/node_modules/.bin/azurite-blob"
    return str(beside) if beside.exists() else shutil.which("azurite-blob")
