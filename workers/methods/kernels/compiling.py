"""Loops over memory, compiled to machine code once for each kind of processor and kept in the user's cache.

A kernel is a plain function in numba's subset of Python, with the types of its arguments:

    @kernel("u16*", "f32*", "i64")
    def widened(raw: Pointer, wide: Pointer, count: int) -> None: ...

The first call in a process loads the object file of the kernel; llvmlite needs 80 ms for this. If there is none for
these sources, this numba and this processor, numba compiles it, in seconds. A kernel runs without Python's lock. It may
call functions of this room; it must not raise, allocate or return a value. numba's defaults keep every rounding: no
operation is contracted, reordered or approximated.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

Pointer = Any
"""In a kernel: numbers in memory, or addresses of such, indexed from 0."""

Loop = Callable[..., None]

_ROOM = __name__.rpartition(".")[0]
_NAMES = {
    "u8": "uint8",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "i64": "int64",
    "f32": "float32",
    "f64": "float64",
}
_SCALARS = {
    "i64": ctypes.c_int64,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
}
_DIGEST_BYTES = 32
_lock = threading.Lock()
_unused = ctypes.create_string_buffer(16)  # a numba function stores None and no exception here
_unused_addresses = ctypes.addressof(_unused), ctypes.addressof(_unused) + 8


class Kernel:
    """A compiled function. A pointer argument is an address: the caller keeps its memory alive and in bounds.

    `arguments` are types: "i64", "f64", "u16*" (the address of numbers), "u16**" (the address of addresses).
    """

    def __init__(self, function: Loop, arguments: Sequence[str]) -> None:
        self.function, self.arguments = function, tuple(arguments)
        self.name = function.__name__.strip("_")
        self._run: Callable[..., int] | None = None

    def __call__(self, *arguments: float) -> None:
        """Runs the kernel. The first call loads or compiles it."""
        if self._run is None:
            kinds = [ctypes.c_void_p if kind.endswith("*") else _SCALARS[kind] for kind in self.arguments]
            with _lock:
                address = _loaded(self).get_function_address(self.name)
            self._run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *kinds)(address)
        self._run(*_unused_addresses, *arguments)

    def cached_at(self) -> Path:
        """The place of the object file: another for other sources, another numba and another processor."""
        import llvmlite.binding as llvm

        libraries = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
        processor = (llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
        digest = hashlib.sha256("\0".join((*libraries, *processor, *self.arguments)).encode())
        for source in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(source.read_bytes())
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        except RuntimeError:  # a user without a home
            folder = Path(os.devnull)
        return folder / "mergeyard" / "kernels" / f"{self.name}-{digest.hexdigest()[:20]}.o"

    def object_code(self) -> bytes:
        """The object file: from the cache, or compiled and put there if that is possible."""
        path = self.cached_at()
        with suppress(OSError):
            stored = path.read_bytes()
            digest, code = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
            if hashlib.sha256(code).digest() == digest:  # LLVM ends the process when it reads a damaged object
                return code
        code = self.compiled()
        with suppress(OSError):  # where nothing can be written, every process spends the time to compile
            path.parent.mkdir(parents=True, exist_ok=True)
            number, part = tempfile.mkstemp(dir=path.parent)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(hashlib.sha256(code).digest() + code)
                Path(part).replace(path)  # whole or not at all, whichever process is first
            except OSError:
                Path(part).unlink()
        return code

    def compiled(self) -> bytes:
        """The object file by the steps of numba's own `jit`, without the wrappers for Python."""
        from numba.core import types
        from numba.core.compiler import Flags, compile_extra
        from numba.core.compiler_lock import global_compiler_lock
        from numba.core.extending import register_jitable
        from numba.core.registry import cpu_target

        def type_of(kind: str) -> Any:
            return types.CPointer(type_of(kind[:-1])) if kind.endswith("*") else getattr(types, _NAMES[kind])

        flags: Any = Flags()
        flags.no_cpython_wrapper = True
        flags.no_cfunc_wrapper = True
        flags.nrt = False
        flags.error_model = "numpy"
        for function in {*_called_by(self.function)}:
            register_jitable(error_model="numpy", no_cfunc_wrapper=True)(function)
        context: Any = cpu_target.typing_context
        target: Any = cpu_target.target_context
        with global_compiler_lock:
            context.refresh()
            target.refresh()
            arguments = tuple(type_of(kind) for kind in self.arguments)
            done = compile_extra(context, target, self.function, arguments, types.void, flags, {})
            module = done.library._final_module.clone()
            module.get_function(done.fndesc.llvm_func_name).name = self.name
            return target.codegen()._tm.emit_object(module)


def kernel(*arguments: str) -> Callable[[Loop], Kernel]:
    """Makes a kernel of a function whose arguments have these types."""
    return lambda function: Kernel(function, arguments)


@cache
def _loaded(kernel: Kernel) -> Any:
    """The engine that holds a kernel's machine code."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(kernel.object_code()))
    engine.finalize_object()
    return engine


def _called_by(function: Loop) -> Iterator[Loop]:
    """The functions of this room that a function calls, by whatever way."""
    assert isinstance(function, FunctionType)
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if isinstance(called, FunctionType) and called.__module__.startswith(_ROOM) and called is not function:
            yield called
            yield from _called_by(called)
