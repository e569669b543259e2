"""The tensors that a pickle of `torch.save` describes, without unpickling it.

A stack machine executes the opcodes that build dicts, lists, tuples, texts and numbers. The few functions that torch
names (torch/_utils.py) are rows of a table here; every other name is refused. Nothing is imported and nothing of the
file is called, so that a hostile pickle cannot run.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.errors import BadInput, CorruptData
from workers.checkpoints.dtypes import TORCH_NAMES

_MARK = object()


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory of one or more tensors: its key in the archive, and its number of elements of `dtype`."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a storage; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def stored_tensors(text: bytes, where: str) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name, or of the one under `state_dict`.

    `BadInput` if the pickle holds something else, names a function that no state dict needs, or has opcodes that
    torch.save does not write.
    """
    try:
        value = _run(text, where)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptData(f"{where}: data.pkl in it is no pickle of torch.save ({error}); fetch it again") from None
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise BadInput(f"{where}: holds no dict of tensors; give the file of a model's state_dict")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise BadInput(f"{where}: {str(name)[:80]!a} in it is no tensor; save the model's state_dict alone")
    return value


@dataclass(frozen=True, slots=True)
class _Name:
    """A function or class that the pickle names."""

    name: str


def _run(text: bytes, where: str) -> Any:
    """The value of the pickle, of plain Python objects."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = len(stack) - 1
        while stack[start] is not _MARK:  # IndexError without a mark
            start -= 1
        found = stack[start + 1 :]
        del stack[start:]
        return found

    for opcode, given, _ in pickletools.genops(text):
        argument: Any = given
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"
                | "BINUNICODE8"
            ):  # fmt: skip
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = since_mark()
                stack[-1].extend(values)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(argument.replace(" ", "."), where))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_named(f"{module}.{name}", where))
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_FUNCTIONS[function.name](*arguments))
            case "BUILD":  # the attributes of an OrderedDict, which say nothing about tensors
                stack.pop()
            case _:
                raise ValueError(f"opcode {opcode.name}")
    raise ValueError("it does not end")


def _named(name: str, where: str) -> _Name:
    if name not in _FUNCTIONS and name not in _STORAGES and name not in _DTYPES:
        raise BadInput(
            f"{where}: names {name[:80]!a}, which a checkpoint of weights does not need; nothing of it was run;"
            " save the model's state_dict alone"
        )
    return _Name(name)


def _storage(kind: Any, storage: _Name, key: Any, _device: Any, elements: Any) -> Storage:
    if kind != "storage" or not isinstance(key, str) or type(elements) is not int:
        raise ValueError("a storage without a key or a size")
    return Storage(key, _STORAGES[storage.name], elements)


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> StoredTensor:
    """`torch._utils._rebuild_tensor_v2` and `_rebuild_tensor_v3`; the latter has a dtype after two other arguments."""
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, Storage) or not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ValueError("a tensor of an impossible shape")
    dtype = next((_DTYPES[value.name] for value in more if isinstance(value, _Name)), storage.dtype)
    if len(shape) != len(strides):
        raise ValueError("a tensor with more strides than dimensions, or fewer")
    return StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _dictionary(items: list[tuple[Any, Any]] | tuple[()] = ()) -> dict[Any, Any]:
    return dict(items)


def _parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_tensor_v3": _rebuilt,
    "torch._utils._rebuild_parameter": _parameter,
}
_STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
    "torch.storage.UntypedStorage": "U8",
}  # fmt: skip
"""torch's classes of storages, and the dtypes of their elements; an untyped storage counts bytes."""

_DTYPES: Mapping[str, str] = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}
