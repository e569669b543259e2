"""The command line of mergekit's users: each option of `mergekit-yaml` works, changes nothing, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.commands.mergekit_options import CHANGES_NOTHING, REFUSED, WITH_VALUE, shard_size
from tests.orchestrator.conftest import Ended

Mergeyard = Callable[..., Ended]


@pytest.fixture
def config(parents: Path, tmp_path: Path) -> Path:
    path = tmp_path / "merge.yml"
    path.write_text(
        f"merge_method: linear\ndtype: bfloat16\nmodels:\n- {{model: {parents}/cos, parameters: {{weight: 0.7}}}}\n"
        f"- {{model: {parents}/fmt, parameters: {{weight: 0.3}}}}\n"
    )
    return path


def test_options_that_change_nothing_say_why_and_change_no_byte(mergeyard: Mergeyard, config: Path, tmp_path: Path):
    assert mergeyard("merge", config, tmp_path / "plain", "-q").code == 0
    given = [part for option in CHANGES_NOTHING for part in ([option, "2"] if option in WITH_VALUE else [option])]
    ended = mergeyard("merge", config, tmp_path / "flags", *given)
    assert ended.code == 0, ended.err
    for option, reason in CHANGES_NOTHING.items():
        assert (f"{option} changes nothing: {reason}\n" in ended.err) == bool(reason)
    for name in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "flags" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert mergeyard("merge", config, tmp_path / "quiet", "-q", *given).err == ""


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_cannot_be_kept_are_refused_and_without_them_it_works(
    mergeyard: Mergeyard, config: Path, tmp_path: Path, option: str
):
    ended = mergeyard("merge", config, tmp_path / "out", option)
    assert (ended.code, ended.err) == (2, f"mergeyard: {option}: {REFUSED[option]}\n")
    assert "leave the option out" in ended.err
    assert not (tmp_path / "out").exists()
    assert mergeyard("merge", config, tmp_path / "out", "-q").code == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("5B", 5 * 10**9), ("500M", 5 * 10**8), ("20k", 20_000), ("1b", 10**9), ("5GB", None), ("2GiB", None)],
)
def test_sizes_of_files_as_mergekit_writes_them(text: str, size: int | None):
    assert shard_size(text) == size


def test_a_billion_is_not_a_byte(mergeyard: Mergeyard, config: Path, tmp_path: Path):
    assert mergeyard("merge", config, tmp_path / "one", "--out-shard-size", "1B", "-q").code == 0
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert mergeyard("merge", config, tmp_path / "many", "--out-shard-size", "3K", "-q").code == 0
    sizes = [path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors")]
    assert len(sizes) > 1


def test_a_device_is_found_on_request(mergeyard: Mergeyard, config: Path, tmp_path: Path):
    assert mergeyard("merge", config, tmp_path / "plain", "-q").code == 0
    assert mergeyard("merge", config, tmp_path / "found", "-q", "--device", "auto").code == 0
    files = [(tmp_path / out / "manifest.json").read_bytes() for out in ("plain", "found")]
    assert files[0] == files[1]
