"""Publishing from a user's chair: to a stand-in for the hub that checks what arrives, and to folders and buckets."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from jobs.errors import BadInput
from jobs.manifest import Manifest
from orchestrator.cli import main
from orchestrator.judging.effective_length import EffectiveLength
from orchestrator.points.licences import Licence, licences_of, reconciled_licence
from orchestrator.points.published_card import _reach
from orchestrator.points.publishing import _renamed
from tests.hub_server import HubServer
from tests.orchestrator.conftest import Ended, files_under
from tests.orchestrator.scores import leave_scores
from workers.storage import open_store

EXAMPLES = Path(__file__).parents[3] / "jobs" / "examples" / "parents"
WRITER = "hf_aTokenThatMayWrite"
LICENCE = "---\nlicense: apache-2.0\n---\n# a parent\n"
OWN_LICENCE = "---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE\n---\n# a parent\n"
JOB = """\
name: soup
parents: {{long: {parents}/long, fmt: {parents}/fmt}}
recipe:
  merge_method: linear
  models:
    - {{model: long, parameters: {{weight: "${{w}}"}}}}
    - {{model: fmt, parameters: {{weight: "${{1 - w}}"}}}}
  dtype: bfloat16
grid: {{w: [0.5, 0.7]}}
point: w{{w}}
shard_size: 600KB
output: {output}
"""
Mergeyard = Callable[..., Ended]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with parents and a finished, scored run of two points under runs/soup."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("long", "fmt"):
        shutil.copytree(EXAMPLES / name, folder / "parents" / name)
        (folder / "parents" / name / "README.md").write_text(LICENCE)
    job = JOB.format(parents=folder / "parents", output=folder / "runs").replace("0.5, 0.7", "0.5, 0.7")
    (folder / "job.yaml").write_text(job)
    assert main(["run", str(folder / "job.yaml"), "--in-process", "-q"]) == 0
    # w0.7 has all of 512 right and half of 1024, w0.5 nothing
    leave_scores(folder / "runs" / "soup", {"w0.7": {512: 1.0, 1024: 0.5}, "w0.5": {512: 0.0, 1024: 0.0}})
    return folder


@pytest.fixture
def run(made: Path) -> Path:
    return made / "runs" / "soup"


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The stand-in, logged in to with a token that may write; without Xet."""
    hub_server.writer = WRITER
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "4")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return hub_server


def refused(ended: Ended, line: str, code: int = 2) -> None:
    assert ended.code == code, ended.err
    assert ended.err.startswith("mergeyard: ") and ended.err.count("\n") == 1, ended.err
    assert line in ended.err
    assert ended.out == ""


def writes(hub: HubServer, kind: str) -> int:
    """How many requests of a kind came."""
    return sum(kind in f"{method} {path}" for _, method, path in hub.requests)


# ---- the hub


def test_the_hub_gets_the_very_weights_in_one_commit_of_a_private_repository(
    mergeyard: Mergeyard, run: Path, hub: HubServer
) -> None:
    ended = mergeyard("publish", run / "w0.7", "hf://someone/soup", "--json")
    assert ended.code == 0, ended.err
    there, here = hub.newest("someone/soup"), files_under(run / "points" / "w0.7")
    assert len([name for name in here if name.endswith(".safetensors")]) > 2
    changed = {"README.md", "manifest.json"}  # mergekit_config.yml has no path in it
    assert {name: data for name, data in there.items() if name not in changed | {".gitattributes"}} == {
        name: data for name, data in here.items() if name not in changed
    }
    assert hub.repositories["someone/soup"].private
    assert len(hub.commits) == 1
    assert json.loads(here["manifest.json"])["digest"][:12] in hub.commits[0]
    assert hub.leaked_tokens == []
    assert ended.facts["url"] == f"{hub.endpoint}/someone/soup"
    assert WRITER not in ended.out + ended.err
    assert mergeyard("verify", "hf://someone/soup").code == 0


def test_the_card_is_what_the_hubs_own_library_reads(mergeyard: Mergeyard, run: Path, hub: HubServer) -> None:
    assert mergeyard("publish", run / "w0.7", "hf://someone/soup", "-q").code == 0
    card = ModelCard(hub.newest("someone/soup")["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert {"mergekit", "merge"} <= set(card.data.tags)
    assert card.data.base_model is None  # no path of this machine
    assert str(run.parents[1]) not in card.content
    assert str(run.parents[1]) not in hub.newest("someone/soup")["manifest.json"].decode()
    results = {result.dataset_config: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"mean": 75, "512": 100, "1024": 50}
    assert results["1024"].dataset_type == "ruler"
    assert results["1024"].task_type == "text-generation"
    claimed = json.loads((run / "points" / "w0.7" / "config.json").read_text())["max_position_embeddings"]
    # four right answers of four at 512, four halves at 1,024: neither is sure
    assert f"512 tokens (95 % interval: 0 to 1,024 or more); the config claims {claimed:,} tokens" in card.text


def test_parents_on_the_hub_are_linked_with_their_revisions(
    mergeyard: Mergeyard, tmp_path: Path, hub: HubServer
) -> None:
    for name in ("long", "fmt"):
        hub.publish(f"someone/{name}", {**files_under(EXAMPLES / name), "README.md": OWN_LICENCE.encode()})
    (tmp_path / "job.yaml").write_text(JOB.format(parents="hf://someone", output=tmp_path))
    assert mergeyard("run", tmp_path / "job.yaml", "--in-process", "-q").code == 0
    assert mergeyard("publish", tmp_path / "soup" / "w0.5", "hf://someone/soup", "-q").code == 0
    card = ModelCard(hub.newest("someone/soup")["README.md"].decode())
    assert card.data.base_model == ["someone/long", "someone/fmt"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert card.data.eval_results is None
    revision = hub.repositories["someone/long"].branches["main"]
    assert f"hf://someone/long@{revision}" in card.text
    assert (card.data.license, card.data.license_name) == ("other", "ours")
    assert card.data.license_link.endswith(f"/blob/{revision}/LICENSE")


def test_a_lone_merge_goes_without_the_paths_of_its_parents(
    mergeyard: Mergeyard, made: Path, tmp_path: Path, hub: HubServer
) -> None:
    document = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [{"model": f"{made}/parents/{name}", "parameters": {"weight": 0.5}} for name in ("long", "fmt")],
    }
    (tmp_path / "merge.yml").write_text(json.dumps(document))
    assert mergeyard("merge", tmp_path / "merge.yml", tmp_path / "merged", "-q").code == 0
    assert mergeyard("publish", tmp_path / "merged", "hf://someone/soup").code == 0
    there = hub.newest("someone/soup")
    assert [name for name, data in there.items() if str(made).encode() in data] == []
    assert yaml.safe_load(there["mergekit_config.yml"])["models"][0]["model"] == "long"
    assert mergeyard("verify", "hf://someone/soup").code == 0


def test_publishing_again_sends_nothing(mergeyard: Mergeyard, run: Path, hub: HubServer) -> None:
    assert mergeyard("publish", run / "w0.7", "hf://someone/soup").code == 0
    before = writes(hub, "PUT ")
    ended = mergeyard("publish", run / "w0.7", "hf://someone/soup")
    assert ended.code == 0
    assert "already there" in ended.out
    assert (writes(hub, "PUT "), len(hub.commits)) == (before, 1)


def test_an_interrupted_upload_goes_on_and_sends_no_shard_twice(
    mergeyard: Mergeyard, run: Path, hub: HubServer
) -> None:
    last = sorted((run / "points" / "w0.7").glob("*.safetensors"))[-1]
    oid = hashlib.sha256(last.read_bytes()).hexdigest()
    hub.write_faults = [(f"/{oid}", 403)]
    refused(mergeyard("publish", run / "w0.7", "hf://someone/soup"), "may not write", 2)
    assert hub.commits == []
    first = sorted((run / "points" / "w0.7").glob("*.safetensors"))[0]
    hub.requests.clear()
    assert mergeyard("publish", run / "w0.7", "hf://someone/soup").code == 0
    assert writes(hub, f"PUT /{hashlib.sha256(first.read_bytes()).hexdigest()}") == 0
    assert writes(hub, f"PUT /{oid}") == 1
    assert mergeyard("verify", "hf://someone/soup").code == 0


@pytest.mark.parametrize("fault", [("preupload", 503), ("/1", 500), ("verify", 502), ("/commit/", 503)])
def test_a_hub_that_stumbles_once_does_not_matter(
    mergeyard: Mergeyard, run: Path, hub: HubServer, fault: tuple[str, int]
) -> None:
    hub.write_faults = [fault]
    assert mergeyard("publish", run / "w0.7", "hf://someone/soup", "-q").code == 0
    assert hub.write_faults == []
    assert len(hub.commits) == 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(mergeyard: Mergeyard, run: Path, hub: HubServer) -> None:
    hub.write_faults = [("/commit/", -503)]
    assert mergeyard("publish", run / "w0.7", "hf://someone/soup", "-q").code == 0
    assert len(hub.commits) == 1


def test_a_hub_that_stays_away_ends_with_try_again(mergeyard: Mergeyard, run: Path, hub: HubServer) -> None:
    hub.write_faults = [("/api/repos/create", 503)] * 1000
    refused(mergeyard("publish", run / "w0.7", "hf://someone/soup"), "the hub answers 503", 75)


def test_a_xet_storage_that_is_away_ends_with_try_again(
    mergeyard: Mergeyard, run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)  # the stand-in has no Xet
    ended = mergeyard("publish", run / "w0.7", "hf://someone/soup")
    refused(ended, "the upload broke off", 75)
    assert hub.commits == []
    assert hub.endpoint not in ended.err


def test_what_somebody_else_commits_meanwhile_is_not_overwritten(
    mergeyard: Mergeyard, run: Path, hub: HubServer
) -> None:
    hub.write_faults = [("/commit/", 412)]
    refused(mergeyard("publish", run / "w0.7", "hf://someone/soup"), "another writer committed", 1)


def test_a_token_is_needed_and_it_must_be_allowed_to_write(
    mergeyard: Mergeyard, run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_aTokenThatMayOnlyRead")
    ended = mergeyard("publish", run / "w0.7", "hf://someone/soup")
    refused(ended, "this token may not write there (403)")
    assert "hf_a" not in ended.err
    monkeypatch.delenv("HF_TOKEN")
    refused(mergeyard("publish", run / "w0.7", "hf://someone/soup"), "not logged in")
    assert hub.repositories == {}


def test_a_flipped_bit_is_not_published(mergeyard: Mergeyard, run: Path, hub: HubServer, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "soup")
    shard = sorted((tmp_path / "soup" / "points" / "w0.7").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused(mergeyard("publish", tmp_path / "soup" / "w0.7", "hf://someone/soup"), "changed since it was written", 1)
    refused(mergeyard("publish", tmp_path / "soup" / "w0.7", tmp_path / "copy"), "changed since it was written", 1)
    assert hub.repositories == {}
    assert not (tmp_path / "copy").exists()


def test_the_next_point_takes_the_place_of_the_last(mergeyard: Mergeyard, run: Path, hub: HubServer) -> None:
    hub.publish("someone/soup", {"LICENSE": b"of the user", ".gitattributes": b""})
    hub.repositories["someone/soup"].private = True
    assert mergeyard("publish", run / "w0.5", "hf://someone/soup").code == 0
    assert mergeyard("publish", run / "w0.7", "hf://someone/soup").code == 0
    there = hub.newest("someone/soup")
    assert there["LICENSE"] == b"of the user"
    assert there["model.safetensors.index.json"] == (run / "points/w0.7/model.safetensors.index.json").read_bytes()
    assert mergeyard("verify", "hf://someone/soup").code == 0


def test_other_weights_and_public_places_are_refused(mergeyard: Mergeyard, run: Path, hub: HubServer) -> None:
    hub.publish("someone/else", {"pytorch_model.bin": b"precious"})
    hub.repositories["someone/else"].private = True
    refused(mergeyard("publish", run / "w0.7", "hf://someone/else"), "holds other weights, pytorch_model.bin")
    hub.publish("someone/open", {})
    refused(mergeyard("publish", run / "w0.7", "hf://someone/open"), "public already; say --public")
    assert mergeyard("publish", run / "w0.7", "hf://someone/open", "--public", "--json").facts["private"] is False
    refused(mergeyard("publish", run / "w0.7", "hf://someone/open@main"), "neither revision nor folder")
    refused(mergeyard("publish", run / "w0.9", "hf://someone/soup"), f"/w0.9: no finished point there; {run} has w0.")
    refused(mergeyard("publish", run, "hf://someone/soup"), f"{run}: no finished point there; {run} has w0.")
    refused(mergeyard("publish", run.parent, "hf://someone/soup"), "no finished point there; see `mergeyard status`")


def test_a_repository_that_is_private_stays_so_and_is_said_to_be(
    mergeyard: Mergeyard, run: Path, hub: HubServer
) -> None:
    assert mergeyard("publish", run / "w0.7", "hf://someone/soup", "--json").facts["private"] is True
    again = ("publish", run / "w0.7", "hf://someone/soup", "--public")
    assert mergeyard(*again, "--json").facts["private"] is True and hub.repositories["someone/soup"].private
    assert "was private before and stays so" in mergeyard(*again).out


def test_a_context_that_passed_at_the_longest_length_may_be_longer() -> None:
    def told(length: int, low: int, high: int) -> str:
        return _reach(EffectiveLength(length, low, high, asked=1024))

    assert told(1024, 1024, 1024) == "1,024 tokens or more, the longest asked"
    assert told(1024, 512, 1024) == "1,024 tokens or more, the longest asked (95 % interval: 512 to 1,024 or more)"
    assert told(512, 512, 1024) == "512 tokens (95 % interval: 512 to 1,024 or more)"
    assert told(512, 512, 512) == "512 tokens"
    assert told(0, 0, 512) == "below the shortest that was asked (95 % interval: 0 to 512)"


def test_a_licence_that_the_hub_does_not_know_is_refused_before_anything_is_made(
    mergeyard: Mergeyard, run: Path, hub: HubServer
) -> None:
    ended = mergeyard("publish", run / "w0.7", "hf://someone/soup", "--license", "apache")
    refused(ended, r'the hub refuses the model card: "\"license\" must be one of')
    assert hub.repositories == {}


# ---- licences


APACHE, OTHER = {"license": "apache-2.0"}, {"license": "other", "license_name": "qwen-research", "license_link": "L"}
FOR_FUN = {"license": "cc-by-nc-4.0"}


def licences(*terms: dict[str, str] | None) -> list[Licence]:
    return [Licence(f"p{number}", said) for number, said in enumerate(terms)]


@pytest.mark.parametrize(
    ("parents", "chosen", "expected"),
    [
        ((APACHE, APACHE), None, APACHE),
        ((OTHER, OTHER), None, OTHER),
        ((APACHE, {"license": "mit"}), "apache-2.0", APACHE),
        ((APACHE, OTHER), "qwen-research", OTHER),
        ((OTHER, {**OTHER, "license_link": "elsewhere"}), None, {**OTHER, "license_link": "elsewhere"}),
        ((None, None), "mit", {"license": "mit"}),
        ((APACHE, FOR_FUN), "cc-by-nc-4.0", FOR_FUN),
        ((APACHE, FOR_FUN), "cc-by-nc-sa-4.0", {"license": "cc-by-nc-sa-4.0"}),
        (({"license": "gpl-3.0"}, APACHE), "gpl-3.0", {"license": "gpl-3.0"}),
        (
            ({"license": "other", "license_link": "https://a/L"},) * 2,
            None,
            {"license": "other", "license_link": "https://a/L"},
        ),
    ],
)
def test_the_merge_has_the_licence_of_its_parents(parents: Any, chosen: str | None, expected: dict[str, str]) -> None:
    assert reconciled_licence(licences(*parents), chosen, public=True) == expected


@pytest.mark.parametrize(
    ("parents", "chosen", "line"),
    [
        ((APACHE, {"license": "mit"}), None, "differ \\(p0 apache-2.0, p1 mit\\); say --license NAME"),
        ((APACHE, None), None, "the card of p1 names no licence; say --license NAME"),
        ((APACHE, OTHER), "apache-2.0", "p1 is under qwen-research, which also holds"),
        ((APACHE, FOR_FUN), "apache-2.0", "p1 is under cc-by-nc-4.0, which also holds for derivatives"),
        (({"license": "cc-by-nd-4.0"},), None, "may not be shared; drop --public"),
        (
            ({"license": "other", "license_link": "https://a/L"}, {"license": "other", "license_link": "https://b/L"}),
            None,
            "differ \\(p0 other \\(https://a/L\\), p1 other \\(https://b/L\\)\\)",
        ),
        (({"license": "other", "license_link": "LICENSE"},) * 2, None, "differ \\(p0 other \\(of p0\\), p1 other"),
        ((APACHE, {**FOR_FUN, "license_name": "ours"}), "mit", "p1 is under cc-by-nc-4.0, which also holds"),
        (({**FOR_FUN, "license_name": "ours"}, {"license": "mit", "license_name": "ours"}), None, "licences differ"),
        *(
            (({"license": own}, APACHE), "mit", f"--license mit: p0 is under {own}, which also holds for derivatives")
            for own in (
                *("gpl-3.0", "agpl-3.0", "lgpl-3.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "bigscience-openrail-m"),
                *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"),
            )
        ),
    ],
)
def test_licences_that_do_not_go_together_are_refused(parents: Any, chosen: str | None, line: str) -> None:
    with pytest.raises(BadInput, match=line):
        reconciled_licence(licences(*parents), chosen, public=True)


# ---- folders and buckets


def test_a_copy_has_the_same_bytes_and_goes_on_where_it_stopped(
    mergeyard: Mergeyard, run: Path, tmp_path: Path
) -> None:
    here = files_under(run / "points" / "w0.7")
    assert mergeyard("publish", run / "points" / "w0.7", tmp_path / "copy").code == 0
    assert files_under(tmp_path / "copy") == here
    damaged = sorted((tmp_path / "copy").glob("*.safetensors"))[0]
    damaged.write_bytes(b"\1" * damaged.stat().st_size)
    again = mergeyard("publish", run / "w0.7", tmp_path / "copy", "--json").facts
    assert again["bytes_sent"] == len(here[damaged.name])
    assert files_under(tmp_path / "copy") == here
    assert mergeyard("publish", run / "w0.7", tmp_path / "copy", "--json").facts["bytes_sent"] == 0
    (tmp_path / "copy" / "manifest.json").unlink()
    missing = sorted((tmp_path / "copy").glob("*.safetensors"))[-1]
    missing.unlink()
    again = mergeyard("publish", run / "w0.7", tmp_path / "copy", "--json").facts
    assert again["bytes_sent"] == len(here[missing.name]) and files_under(tmp_path / "copy") == here
    refused(mergeyard("publish", run / "w0.5", tmp_path / "copy"), "another point lies there")
    refused(mergeyard("publish", run / "w0.5", tmp_path), "not empty")


def test_a_model_of_somebody_elses_is_not_replaced(mergeyard: Mergeyard, run: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(run / "points" / "w0.5", theirs)
    (theirs / "manifest.json").unlink()
    (theirs / "README.md").unlink()  # which could be sent, but for the weights
    before = files_under(theirs)
    refused(mergeyard("publish", run / "w0.7", theirs), "holds something else")
    assert files_under(theirs) == before


def test_a_merge_that_says_nothing_has_the_licences_of_its_parents(
    mergeyard: Mergeyard, run: Path, tmp_path: Path
) -> None:
    manifest = Manifest.from_json((run / "points" / "w0.7" / "manifest.json").read_bytes())
    found = {licence.parent for licence in licences_of({"merge": str(run / "points" / "w0.7")})}
    assert found == set(manifest.parents)


@pytest.mark.parametrize(
    ("text", "names", "told"),
    [
        ("hf://org/base-7b and /base", {"/base": "base"}, "hf://org/base-7b and base"),
        ("/a/b/c.", {"/a/b": "x", "/a/b/c": "y"}, "y."),
        ('"/a/b"', {"/a/b": "b"}, '"b"'),
    ],
)
def test_only_whole_paths_are_shortened(text: str, names: dict[str, str], told: str) -> None:
    assert _renamed(text, names) == told


def test_from_a_bucket_to_the_hub_and_to_another_folder_of_it(
    mergeyard: Mergeyard, run: Path, hub: HubServer, s3_url: str
) -> None:
    assert mergeyard("publish", run / "w0.7", f"{s3_url}/kept").code == 0
    here = files_under(run / "points" / "w0.7")
    store = open_store(f"{s3_url}/kept")
    assert {info.key: bytes(store.read(info.key)) for info in store.list()} == here
    assert mergeyard("publish", f"{s3_url}/kept", f"{s3_url}/more").code == 0
    ended = mergeyard("publish", f"{s3_url}/kept", "hf://someone/soup")
    assert ended.code == 0, ended.err
    shards = {name: data for name, data in here.items() if name.endswith(".safetensors")}
    assert {name: data for name, data in hub.newest("someone/soup").items() if name in shards} == shards


def test_a_point_that_is_the_same_merge_as_another_goes_as_that_one(
    mergeyard: Mergeyard, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "soup")
    manifest = Manifest.from_json((run / "points/w0.7/manifest.json").read_bytes())
    twin = replace(manifest, point="twin", same_as="w0.7", files={}, tensors={})
    (tmp_path / "soup/points/twin").mkdir()
    (tmp_path / "soup/points/twin/manifest.json").write_bytes(twin.to_json())
    ended = mergeyard("publish", tmp_path / "soup" / "twin", tmp_path / "copy")
    assert ended.out.startswith("twin (the same merge as w0.7): ")
    assert files_under(tmp_path / "copy") == files_under(run / "points" / "w0.7")
