"""What no line of the packages may do, read off the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("jobs", "workers", "orchestrator")

FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "makes code of text",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "pickle.load": "runs what a file says",
    "pickle.loads": "runs what a message says",
    "marshal.loads": "runs what a message says",
    "torch.load": "unpickles a file",
    "yaml.load": "makes objects of tags; yaml.parse and safe_load do not",
    "yaml.unsafe_load": "makes objects of tags",
    "yaml.full_load": "makes objects of tags",
    "tempfile.mktemp": "names a file that somebody else can make first",
    "numpy.load": "unpickles a file",
}


ALLOWED = {
    ("workers/benchmarks/scorers.py", "exec: runs text as code"),
    ("workers/benchmarks/scorers.py", "compile: makes code of text"),
}
"""The function that a job names under `scorer: python:…` is the user's own code, which the job is to run."""


def complaints(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and reason of everything in a module that may not be there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield node.lineno, f"{name}: {FORBIDDEN_CALLS[name]}"
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if keyword.arg == "trust_remote_code" and value != "False":
                    yield node.lineno, "trust_remote_code: runs a checkpoint's code"
                if keyword.arg == "shell" and value != "False":
                    yield node.lineno, "shell: runs a shell"
                if keyword.arg in ("verify", "allow_invalid_certificates") and value in ("False", "True"):
                    yield node.lineno, f"{keyword.arg}: trusts any certificate"
                if keyword.arg == "env_vars":
                    yield node.lineno, "env_vars: shown to everyone who sees the dashboard"
                if keyword.arg == "weights_only" and value != "True":
                    yield node.lineno, "weights_only: unpickles a file"
        if isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and key.value in ("env_vars", "trust_remote_code"):
                    yield node.lineno, f"{key.value}: set where it is handed on"


def test_no_line_runs_what_it_was_given_or_shows_the_environment() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 60
    found = [
        f"{path.relative_to(ROOT)}:{line}: {reason}"
        for path in files
        for line, reason in complaints(ast.parse(path.read_text(encoding="utf-8")))
        if (str(path.relative_to(ROOT)), reason) not in ALLOWED
    ]
    assert found == []


@pytest.mark.parametrize(
    "slip",
    [
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "f(trust_remote_code=wanted)",
        "options = {'trust_remote_code': True}",
        "ray.init(runtime_env={'env_vars': dict(os.environ)})",
        "subprocess.run(text, shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "pickle.loads(data)",
        "requests.get(url, verify=False)",
    ],
)
def test_a_slip_is_found(slip: str) -> None:
    assert list(complaints(ast.parse(slip)))


def test_a_checkpoint_is_opened_without_its_code() -> None:
    named = [
        node
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".from_pretrained", ".from_config"))
    ]
    assert named, "there are such calls"
    for call in named:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        told = [value for name, value in given.items() if name == "trust_remote_code"]
        assert told == ["False"] or ast.unparse(call.func) == "GenerationConfig.from_pretrained", ast.unparse(call)
