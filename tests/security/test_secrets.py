"""What a run leaves behind, and what it says, holds none of the secrets that it was given."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exc

import pyarrow.parquet as parquet
import pytest

from jobs.errors import BadInput, MergeyardError
from jobs.job import load_job
from orchestrator.cli import main
from tests.seaweedfs import SeaweedFS
from workers.storage import Store, open_store

PARENTS = Path(__file__).parents[2] / "jobs" / "examples" / "parents"
PLANTED = {
    "HF_TOKEN": "hf_plantedPLANTEDplanted0123456789",
    "OPENAI_API_KEY": "sk-planted-0123456789",
    "RAY_AUTH_TOKEN": "rayplanted0123456789abcdef",
    "AZURE_STORAGE_ACCOUNT_KEY": "cGxhbnRlZC1henVyZS1rZXk=",
    "MERGEYARD_WEBHOOK": "https://127.0.0.1:9/services/planted-webhook",
    "SOMEBODYS_PASSWORD": "planted-and-not-ours",
}
JOB = """
name: quiet
parents: {{long: '{parents}/long', fmt: '{parents}/fmt'}}
recipe:
  merge_method: linear
  models: [{{model: long, parameters: {{weight: "${{w}}"}}}}, {{model: fmt, parameters: {{weight: "${{1 - w}}"}}}}]
  dtype: bfloat16
grid: {{w: [0.25, 0.75]}}
evaluate:
  needle: {{lengths: [256], depths: 2, items: 2, haystack: noise}}
keep: all
output: {output}
"""


@dataclass(frozen=True)
class Ended:
    """What a command said, and how it ended; `code` None is a traceback, which somebody asked for."""

    code: int | None
    said: str


@pytest.fixture
def mergeyard(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """mergeyard("run", path, …, VARIABLE="value"): the command, in this process, with the planted secrets about."""

    def run(*arguments: object, **environment: str) -> Ended:
        with monkeypatch.context() as patched:
            for name, value in {**PLANTED, **environment}.items():
                patched.setenv(name, value)
            traceback, code = "", None
            try:
                code = main([str(argument) for argument in arguments])
            except MergeyardError:
                traceback = format_exc()
        captured = capfd.readouterr()
        return Ended(code, captured.out + captured.err + traceback)

    return run


Mergeyard = Callable[..., Ended]


def texts_of(store: Store) -> Iterator[tuple[str, str]]:
    """Every object's key and its content as text; of a parquet file, its values and its metadata."""
    for info in store.list():
        content = bytes(store.read(info.key))
        yield info.key, content.decode("latin-1")
        if info.key.endswith(".parquet"):
            table = parquet.read_table(io.BytesIO(content))
            yield info.key, f"{table.schema.metadata} {table.to_pylist()}"


def test_nothing_that_a_run_leaves_or_says_holds_a_secret(
    mergeyard: Mergeyard, s3_environment: SeaweedFS, s3_url: str, tmp_path: Path
) -> None:
    secrets = {*PLANTED.values(), s3_environment.secret_key}
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(parents=PARENTS, output=s3_url))
    run = f"{s3_url}/quiet"
    told = [mergeyard("run", job, "--in-process", "--json")]
    assert told[0].code == 0, told[0].said
    told += [mergeyard(verb, run, "--json") for verb in ("status", "verify", "report")]
    told.append(mergeyard("run", job, "--in-process", AWS_SECRET_ACCESS_KEY="planted-and-wrong"))
    told.append(mergeyard("run", job, "--in-process", MERGEYARD_TRACEBACK="1", AWS_SECRET_ACCESS_KEY="planted-wrong"))
    assert [ended.code for ended in told] == [0, 0, 0, 0, 2, None], told
    everything = [*texts_of(open_store(run)), *(("said", ended.said) for ended in told)]
    found = {(place, secret) for place, text in everything for secret in (*secrets, "planted") if secret in text}
    assert found == set()
    kinds = {place.rsplit(".", 1)[-1] for place, text in everything if "w0.25" in text}
    assert {"json", "parquet", "md", "said"} <= kinds, "the search finds what is there, in every kind of file"


URLS = (
    "s3://AKIAPLANTED:planted@bucket/x",
    "https://user:planted@host/model",
    "https://host/model?X-Amz-Signature=planted",
    "az://container/model?sv=2024&sig=planted",
    "gs://bucket/model?access_token=planted",
    "hf://user:planted@org/name",
)


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_credentials_is_refused_and_not_repeated(mergeyard: Mergeyard, url: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        open_store(url)
    assert "planted" not in str(refused.value)
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(parents=PARENTS, output=tmp_path / "runs").replace(f"'{PARENTS}/fmt'", f"'{url}'"))
    ended = mergeyard("run", job, "--in-process")
    assert ended.code == 2
    assert "planted" not in ended.said
    assert not (tmp_path / "runs").exists(), "nothing is written, the job's text least of all"


@pytest.mark.parametrize("url", ["http://user:planted@host/v1", "http://host/v1?key=planted"])
def test_a_servers_address_with_credentials_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    text = JOB.format(parents=PARENTS, output=tmp_path) + f"engine: {{name: openai, url: '{url}'}}\n"
    with pytest.raises(BadInput, match=r"job.yaml:\d+: the server's address holds no credentials") as refused:
        load_job(text, "job.yaml")
    assert "planted" not in str(refused.value)


LOADERS = (
    "trust_remote_code", "worker_cls", "worker_extension_cls", "hf_overrides", "tokenizer", "reasoning_parser_plugin",
    "tool_parser_plugin", "structured_outputs_config", "speculative_config", "lora_modules", "load_format", "hf_token",
    "compilation_config", "logits_processors", "io_processor_plugin", "quantization", "url", "model", "python",
)  # fmt: skip
"""Options of vLLM, of today and of tomorrow, and parameters of our own classes, that a job file does not set."""


@pytest.mark.parametrize("option", LOADERS)
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_job_tells_an_engine_nothing_that_could_load_code_or_another_model(
    engine: str, option: str, tmp_path: Path
) -> None:
    text = JOB.format(parents=PARENTS, output=tmp_path) + f"engine: {{name: {engine}, options: {{{option}: x}}}}\n"
    with pytest.raises(BadInput, match=rf'job.yaml:\d+: the engine {engine} takes no option "{option}"'):
        load_job(text, "job.yaml")


@pytest.mark.parametrize(
    "key", ["endpoint", "endpoint_url", "credentials", "env", "environment", "runtime_env", "token"]
)
def test_a_job_cannot_say_where_a_service_is_or_who_asks(key: str, tmp_path: Path) -> None:
    text = JOB.format(parents=PARENTS, output=tmp_path)
    for changed in (
        f"{text}{key}: x\n",
        f"{text}workers: {{{key}: x}}\n",
        re.sub(r"long: '(.*?)'", rf"long: {{url: '\1', {key}: x}}", text, count=1),
    ):
        with pytest.raises(BadInput):
            load_job(changed, "job.yaml")
