"""Import every module of some packages and print, as a JSON list, what that did besides defining names.

    python import_effects.py ROOT PACKAGE…

Noticed: files and folders written, removed or renamed, threads and processes started, sockets opened, the environment,
the import path or the root logger changed, anything printed. Foreign libraries are imported first, so that what they
do when imported is not held against us. Not noticed: threads of compiled code, settings of other libraries.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

EFFECTS = {
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime"),
    *("os.putenv", "os.unsetenv", "os.chdir", "os.fork", "os.exec", "os.posix_spawn", "os.system", "subprocess.Popen"),
    *("socket.connect", "socket.bind"),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def module_files(root: Path, packages: list[str]) -> dict[str, Path]:
    """Dotted name → file of every module of the packages."""
    files = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def foreign_imports(file: Path, packages: list[str]) -> list[ast.stmt]:
    """The import statements at the top of a module that reach outside the packages."""

    def is_foreign(statement: ast.stmt) -> bool:
        match statement:
            case ast.Import(names=names):
                return all(alias.name.split(".")[0] not in packages for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                return module.split(".")[0] not in packages and module != "__future__"
            case _:
                return False

    return [statement for statement in ast.parse(file.read_text()).body if is_foreign(statement)]


def effects_of_importing(root: Path, packages: list[str]) -> list[str]:
    """One line an effect: the module whose import had it, the event, what it concerned."""
    files = module_files(root, packages)
    for file in files.values():
        for statement in foreign_imports(file, packages):
            exec(compile(ast.Module([statement], []), str(file), "exec"), {})

    effects: list[str] = []
    importing = ""

    def notice(event: str, arguments: tuple[Any, ...]) -> None:
        if not importing:
            return
        writes = event == "open" and (arguments[2] or 0) & WRITING and arguments[0] != os.devnull
        if writes or event in EFFECTS:
            effects.append(f"{importing}: {event} {arguments[0] if arguments else ''}")

    start = threading.Thread.start  # Python tells audit hooks of new threads only from 3.12 on

    def start_noticed(thread: threading.Thread) -> None:
        if importing:
            effects.append(f"{importing}: started a thread")
        start(thread)

    sys.addaudithook(notice)
    threading.Thread.start = start_noticed
    for name in files:
        before = list(sys.path), list(logging.root.handlers)
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
            importing = name
            importlib.import_module(name)
            importing = ""
        if (list(sys.path), list(logging.root.handlers)) != before:
            effects.append(f"{name}: changed sys.path or the root logger")
        if printed.getvalue():
            effects.append(f"{name}: printed {printed.getvalue()!r}")
    return effects


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    root = Path(sys.argv[1])
    sys.path[0] = str(root)
    print(json.dumps(effects_of_importing(root, sys.argv[2:])))
