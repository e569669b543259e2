"""Damaged safetensors headers, and what must come of every one of them.

From valid headers: bytes flipped, cut, doubled and put in; and, knowing that it is JSON, values swapped for ones that
no header has, keys doubled, entries moved, lists nested, offsets shifted together. Whatever comes in, the answer is
`CorruptData`, in one line, or tensors that lie one behind the other to the end of the file; and what is accepted, the
safetensors library accepts too.
"""

from __future__ import annotations

import json
import random
from typing import Any

from safetensors import SafetensorError, deserialize

from jobs.errors import CorruptData
from workers.checkpoints.safetensors import header_bytes, read_header
from workers.storage import ObjectInfo
from workers.storage.memory import MemoryStore

ODD_NUMBERS = (
    *("-1", "0", "1", "2", "3", "255", "4294967296", "9223372036854775807", "9223372036854775808", "1e3", "0.5"),
    *("18446744073709551615", "18446744073709551616", "1E400", "9" * 400, "9" * 5000, "NaN", "Infinity"),
)
ODD_VALUES = (
    *ODD_NUMBERS,
    *("null", "true", "false", '""', "[]", "{}", '"BF16"', '"F4"', '"\\ud800"', "[[[[[[[[]]]]]]]]", "[0,0]", "[0,0,0]"),
    *("[" * 2000 + "]" * 2000, '{"a":' * 500 + "1" + "}" * 500, '"' + "x" * 2000 + '"', "[" + "1," * 100 + "1]"),
    *("[1,2", "}", '"\\u0000"', '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'),
)
PIECES = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\x00", b"\xff", b" ", b"\n", b"\xef\xbb\xbf", b"-", b"e9"),
    *(b"null", b'"__metadata__"', b'"x":', b"\xed\xa0\x80", b"/**/", b"'", b"0x1"),
)


def corpus() -> list[tuple[bytes, int]]:
    """Headers as files have them, and how many bytes of tensors follow."""
    found: list[tuple[bytes, int]] = []
    for tensors in (
        [],
        [("x", "BF16", (2, 3))],
        [("x", "F32", ()), ("y", "BOOL", (0, 4)), ("z", "F8_E4M3", (5,))],
        [("model.embed_tokens.weight", "BF16", (4, 2)), ("model.norm.weight", "F32", (2,)), ("é", "I64", (1, 1, 1))],
        [(f"model.layers.{number}.mlp.weight", "F16", (2, 2)) for number in range(6)],
    ):
        header = header_bytes(tensors)
        size = 0
        for entry in json.loads(header[8:]).values():
            size = max([size, *entry.get("data_offsets", ())])
        found.append((header[8:], size))
    found.append((b'{"x":{"data_offsets":[0,4],"shape":[4],"dtype":"U8"}}   ', 4))
    found.append((b'{"__metadata__":{"a":"b","c":"{[\\"]}"},"x":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1))
    return found


def damaged(draw: random.Random, known: list[tuple[bytes, int]]) -> bytes:
    """A file with one to four damages."""
    text, size = draw.choice(known)
    text = damaged_text(draw, text, [other for other, _ in known])
    length = len(text)
    if draw.random() < 0.05:
        length = draw.choice((0, 1, len(text) - 1, len(text) + 1, 1 << 30, (1 << 64) - 1, draw.randrange(1 << 20)))
    if draw.random() < 0.1:
        size = max(0, size + draw.choice((-1, 1, 8, 1000)))
    file = (length % (1 << 64)).to_bytes(8, "little") + text + bytes(size)
    return file[: draw.randrange(len(file) + 1)] if draw.random() < 0.03 else file


def damaged_text(draw: random.Random, text: bytes, known: list[bytes]) -> bytes:
    """JSON with one to four damages; `known` are texts that parts may come from."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        text = _with_odd_json(draw, text) if draw.random() < 0.6 else _with_odd_bytes(draw, text, known)
    return text


def _with_odd_bytes(draw: random.Random, text: bytes, known: list[bytes]) -> bytes:
    at = draw.randrange(len(text) + 1)
    match draw.randrange(6):
        case 0:
            return text[:at] + draw.choice(PIECES) + text[at:]
        case 1:
            return text[:at] + text[at + draw.randrange(1, 12) :]
        case 2 if at < len(text):
            return text[:at] + bytes([text[at] ^ 1 << draw.randrange(8)]) + text[at + 1 :]
        case 3:
            end = min(len(text), at + draw.randrange(1, 40))
            return text[:end] + text[at:end] + text[end:]
        case 4:
            other = draw.choice(known)
            return text[:at] + other[draw.randrange(len(other)) :]
        case _:
            return text[:at] + draw.randbytes(draw.randrange(1, 8)) + text[at:]


def _with_odd_json(draw: random.Random, text: bytes) -> bytes:
    """The same JSON with one value, key or entry that it should not have; or as it was, if it is no JSON any more."""
    try:
        header: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(header, dict) or not header:
        return b'{"x":' + draw.choice(ODD_VALUES).encode() + b"}"
    name = draw.choice(list(header))
    match draw.randrange(7):
        case 0:
            return _spliced(header, name, draw.choice(ODD_VALUES))
        case 1:
            return _inside(draw, header, name)
        case 2:
            entry = json.dumps(header[name])
            return json.dumps(header)[:-1].encode() + f",{json.dumps(name)}:{entry}}}".encode()
        case 3:
            other = draw.choice(list(header))
            header[name], header[other] = header[other], header[name]
        case 4:
            del header[name]
        case 5:
            shift = draw.choice((-8, -1, 1, 2, 1 << 40))
            for entry in header.values():
                if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
                    entry["data_offsets"] = [at + shift if isinstance(at, int) else at for at in entry["data_offsets"]]
        case _:
            header = dict(draw.sample(list(header.items()), len(header)))
    return json.dumps(header, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def _inside(draw: random.Random, header: dict[str, Any], name: str) -> bytes:
    entry = header[name]
    if not isinstance(entry, dict) or not entry:
        return _spliced(header, name, draw.choice(ODD_VALUES))
    key = draw.choice(list(entry))
    value = entry[key]
    if isinstance(value, list) and value and draw.random() < 0.7:
        parts = [json.dumps(part) for part in value]
        parts[draw.randrange(len(parts))] = draw.choice(ODD_NUMBERS)
        odd = f"[{','.join(parts)}]"
    else:
        odd = draw.choice(ODD_VALUES)
    marked = {**entry, key: "@odd@"}
    return _spliced(header, name, json.dumps(marked).replace('"@odd@"', odd))


def _spliced(header: dict[str, Any], name: str, value: str) -> bytes:
    """The header with raw text for one value."""
    return json.dumps({**header, name: "@odd@"}).replace('"@odd@"', value).encode("utf-8", "surrogatepass")


def check(file: bytes) -> bool:
    """Whether the file was accepted; `AssertionError` when what came of it must not be."""
    store = MemoryStore("memory://fuzz")
    info = store.write("model.safetensors", file)
    try:
        found = read_header(store, ObjectInfo(info.key, info.size, info.etag))
    except CorruptData as refusal:
        assert str(refusal).startswith("memory://fuzz/model.safetensors: ")
        assert str(refusal).isprintable(), "one line"
        assert len(str(refusal)) < 2500
        return False
    position = 8 + int.from_bytes(file[:8], "little")
    for tensor in found:
        assert tensor.start == position
        assert tensor.end >= position
        position = tensor.end
    assert position == len(file)
    if b"-0" in file:  # a whole number to Python, and none to the library
        return True
    try:
        theirs = deserialize(file)
    except SafetensorError as error:
        raise AssertionError(f"the library refuses what was accepted: {error}: {file!r}") from None
    assert sorted((name, tuple(spec["shape"])) for name, spec in theirs) == sorted(
        (tensor.name, tensor.shape) for tensor in found
    )
    return True
