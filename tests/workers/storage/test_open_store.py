"""The one door: which URL opens which store, and what is said about the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.errors import AccessDenied, BadInput
from workers.storage import open_store


def test_a_path_and_a_file_url_are_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    open_store(folder).write("name", b"x")
    for url in (
        str(folder),
        f"{folder}/",
        f"file://{tmp_path}/with%20space",
        f"file://localhost{tmp_path}/with%20space",
    ):
        assert bytes(open_store(url).read("name")) == b"x"
        assert open_store(url).url == str(folder)


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("runs").url == str(tmp_path / "runs")


def test_a_memory_store_is_one_for_the_process() -> None:
    open_store("memory://one").write("name", b"x")
    assert bytes(open_store("memory://one/").read("name")) == b"x"
    assert list(open_store("memory://two").list()) == []


@pytest.mark.parametrize("url", ["http://example.org/model", "s4://bucket", "ftp://host/x"])
def test_an_unknown_scheme_names_the_known_ones(url: str) -> None:
    with pytest.raises(BadInput, match="s3://, gs://, az://, hf:// or memory://"):
        open_store(url)


@pytest.mark.parametrize("url", ["", "file://host/x", "s3://", "s3:///prefix", "s3://b", "s3://user:secret@bucket/x"])
def test_a_malformed_url_is_refused_without_repeating_secrets(url: str) -> None:
    with pytest.raises(BadInput) as refusal:
        open_store(url)
    assert "secret" not in str(refusal.value)


def test_a_folder_is_opened_without_any_cloud_library() -> None:
    program = (
        "import sys; from workers.storage import open_store; open_store('.'); open_store('memory://x')\n"
        "print([name for name in ('boto3', 'obstore', 'huggingface_hub', 'numpy', 'torch') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"


def test_azure_without_an_account_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(AccessDenied, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/run")
