"""A GPU that is not there: the device `card`, whose tensors have their numbers in the memory of the host.

It behaves as CUDA does where a mistake would show on CUDA alone:

* An operation that meets a tensor of the host beside one of the card is an error, and so is `numpy()` of the card's.
* Work lags behind. A kernel waits in the queue of its stream, and so does a copy from or to pinned memory that does not
  block, until somebody waits for the stream or for an event recorded after it. Whoever reads too early reads garbage.
* relu of -0.0 is +0.0, a division by a number of the host multiplies by its reciprocal, and `addcmul` rounds the
  product before it adds it.
* Memory ends: an allocation beyond `CARD.total` times the fraction of this process raises `torch.OutOfMemoryError`.

`CARD` counts launches, synchronisations and the bytes over the bus. The fixture `card` gives it to a test.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "card"
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
"""Operations whose result the host waits for."""


class Stream:
    """A queue of work that is done when somebody waits for it."""

    def __init__(self, device: Any = None) -> None:
        self._queue: list[Callable[[], object]] = []
        self._done = 0

    def put(self, work: Callable[[], object]) -> None:
        with CARD.lock:
            if CARD.lags:
                self._queue.append(work)
            else:
                work()

    def run(self, upto: int | None = None) -> None:
        """Does the work in the queue, or that up to a place in it."""
        with CARD.lock:
            while self._queue and (upto is None or self._done < upto):
                self._done += 1
                self._queue.pop(0)()

    @property
    def end(self) -> int:
        """The place after all work that was put in so far."""
        return self._done + len(self._queue)

    def synchronize(self) -> None:
        CARD.waits["stream"] += 1
        self.run()

    def wait_event(self, event: Event) -> None:
        self.put(event.run)

    def wait_stream(self, other: Stream) -> None:
        end = other.end
        self.put(lambda: other.run(end))


class Event:
    """A place in a stream."""

    def __init__(self, **_: Any) -> None:
        self._place: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or CARD.current_stream()
        self._place = stream, stream.end

    def run(self) -> None:
        if self._place is not None:
            self._place[0].run(self._place[1])

    def query(self) -> bool:
        return self._place is None or self._place[0]._done >= self._place[1]

    def synchronize(self) -> None:
        CARD.waits["event"] += 1
        self.run()


class Card:
    """torch's module of the device, and its counters."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.live = 0
        self._local = threading.local()
        self.begin()

    def begin(self) -> None:
        """As new: work lags, and all of 80 GiB are there for this process."""
        self.lags, self.total, self._fraction = True, 80 << 30, 1.0
        self._default, self.pinned = Stream(), list[torch.Tensor]()
        self.count_from_here()

    def count_from_here(self) -> None:
        """Sets all counters to zero."""
        self.launches, self.waits, self.bytes = Counter[str](), Counter[str](), Counter[str]()
        self.peak = self.live

    def allocate(self, size: int) -> None:
        with self.lock:
            if self.live + size > self.total * self._fraction:
                raise torch.OutOfMemoryError(f"card out of memory. Tried to allocate {size} bytes")
            self.live += size
            self.peak = max(self.peak, self.live)

    def free(self, size: int) -> None:
        with self.lock:
            self.live -= size

    # as torch.cuda has them

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._local, "stream", None) or self._default

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._local.stream = before

    def synchronize(self, device: Any = None) -> None:
        self.current_stream().synchronize()

    def get_device_properties(self, device: Any = None) -> Any:
        return SimpleNamespace(total_memory=self.total, name="a card that is not there", uuid="card-0")

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        _numbered(device)
        self._fraction = fraction

    def get_per_process_memory_fraction(self, device: Any = None) -> float:
        _numbered(device)
        return self._fraction

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def empty_cache(self) -> None:
        self.launches["empty_cache"] += 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...


class _Hook(torch._C._acc.PrivateUse1Hooks):
    """No library takes this process for one with a GPU."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, dev_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


CARD = Card()
_setup_privateuseone_for_python_backend(NAME, CARD, _Hook())


class OnCard(torch.Tensor):
    """A tensor of the card; `host` has its numbers."""

    host: torch.Tensor
    owner: object

    @staticmethod
    def __new__(cls, host: torch.Tensor, owner: object = None) -> OnCard:
        with torch.inference_mode(False):  # a view of a tensor that was made outside cannot be made inside
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=torch.device(NAME, 0),
            )
        made.host, made.owner = host, owner or _Owner(host.untyped_storage().nbytes())
        return made

    def __init__(self, host: torch.Tensor, owner: object = None) -> None: ...

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():  # inference mode leaves operations whole that consist of others
            return func.decompose(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        flat = tree_flatten((args, kwargs))[0]
        cards = [each for each in flat if isinstance(each, OnCard)]
        others = [each for each in flat if isinstance(each, torch.Tensor) and not isinstance(each, OnCard)]
        to = kwargs.get("device")
        if name == "copy_":
            return _copy(args[0], args[1], bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False)))
        if name == "_to_copy" and to is not None and torch.device(to).type == "cpu":
            return _copy(torch.empty_like(cards[0].host, dtype=kwargs.get("dtype")), cards[0], False)
        if any(other.dim() > 0 for other in others):
            found = [(tuple(each.shape), str(each.device)) for each in (*cards, *others)]
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device: {found}")
        if to is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        host_args, host_kwargs = tree_map(_host, (args, kwargs))
        stream = CARD.current_stream()
        if name in WAITS or any(each.dtype == torch.bool for each in _indices(name, args)):
            CARD.waits[name] += 1
            stream.run()
            return _wrapped(func(*host_args, **host_kwargs), cards)
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        if alias is not None and not alias.is_write:  # a view
            return _wrapped(func(*host_args, **host_kwargs), cards, cards[0].owner)
        if name.startswith(("empty", "new_empty")):
            return _wrapped(_garbage(func(*host_args, **host_kwargs)), cards)
        CARD.launches[name] += 1
        compute = _compute(name, func, args)
        if alias is not None:  # in place, or into `out=`
            stream.put(lambda: compute(*host_args, **host_kwargs))
            return _returned(func, args, kwargs)
        if not CARD.lags:
            return _wrapped(compute(*host_args, **host_kwargs), cards)
        results = _shaped_like(_meta(func, host_args, host_kwargs))

        def work() -> None:
            found = compute(*host_args, **host_kwargs)
            for result, value in zip(tree_flatten(results)[0], tree_flatten(found)[0], strict=True):
                if isinstance(result, torch.Tensor):
                    result.copy_(value)

        stream.put(work)
        return _wrapped(results, cards)


class _Owner:
    """Memory of the card that is free again when no tensor has it."""

    def __init__(self, size: int) -> None:
        CARD.allocate(size)
        weakref.finalize(self, CARD.free, size)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, OnCard) else value


def _numbered(device: Any) -> None:
    """As in `torch.cuda`, which asks for the number of the card here and nowhere else."""
    if device is not None and not isinstance(device, int) and torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")


def _indices(name: str, args: Any) -> list[torch.Tensor]:
    """The masks by which a tensor is indexed: how much they take is known when they are."""
    if name not in ("index", "index_put_", "index_put"):
        return []
    return [each for each in args[1] if isinstance(each, torch.Tensor)]


def _wrapped(value: Any, cards: list[OnCard], owner: object = None) -> Any:
    known = {id(card.host): card for card in cards}

    def wrap(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        return known[id(each)] if id(each) in known else OnCard(each, owner)

    return tree_map(wrap, value)


def _returned(func: Any, args: Any, kwargs: Any) -> Any:
    """The tensors that an operation writes to, which it returns."""
    named = [argument.name for argument in func._schema.arguments]
    given = dict(zip(named, args, strict=False)) | kwargs
    written = [
        given[each.name] for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write
    ]
    return written[0] if len(func._schema.returns) == 1 else tuple(written)


def _garbage(made: torch.Tensor) -> torch.Tensor:
    """Memory with something in it that nobody computed."""
    return made.fill_(77) if made.dtype != torch.bool else made.fill_(True)


def _meta(func: Any, args: Any, kwargs: Any) -> Any:
    away = {"device": torch.device("meta")} if kwargs.get("device") is not None else {}
    there, more = tree_map(lambda each: each.to("meta") if isinstance(each, torch.Tensor) else each, (args, kwargs))
    return func(*there, **(more | away))


def _shaped_like(value: Any) -> Any:
    def make(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        return _garbage(torch.empty_strided(each.size(), each.stride(), dtype=each.dtype))

    return tree_map(make, value)


def _compute(name: str, func: Any, args: Any) -> Callable[..., Any]:
    """The operation with the last bits of CUDA's (TensorCompare.cu, BinaryDivTrueKernel.cu, PointwiseOpsKernel.cu)."""
    if name == "relu":
        return lambda of: torch.relu(of) + 0.0
    if name in ("div", "div_") and isinstance(args[0], OnCard) and not isinstance(args[1], OnCard):
        return lambda a, b, **more: func(a, b, **more) if more else _times_reciprocal(name, a, b)
    if name in ("addcmul", "addcmul_"):
        return lambda a, b, c, value=1, **_: _of_two_roundings(name, a, b, c, value)
    return func


def _times_reciprocal(name: str, a: torch.Tensor, b: Any) -> torch.Tensor:
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    inverse = float(1.0 / torch.as_tensor(b).to(wide))
    return a.mul_(inverse) if name == "div_" else a.mul(inverse)


def _of_two_roundings(name: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, value: float) -> torch.Tensor:
    product = b.mul(c).mul_(value)
    return a.add_(product) if name == "addcmul_" else a.add(product)


def _is_pinned(host: torch.Tensor) -> bool:
    first = host.data_ptr()
    return any(0 <= first - each.data_ptr() < max(1, each.nbytes) for each in CARD.pinned)


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    stream = CARD.current_stream()
    into, out_of = _host(target), _host(source)
    size = out_of.numel() * out_of.element_size()
    if isinstance(target, OnCard) and isinstance(source, OnCard):
        CARD.launches["copy_"] += 1
        stream.put(lambda: into.copy_(out_of))
        return target
    way = "to the card" if isinstance(target, OnCard) else "from the card"
    host = out_of if isinstance(target, OnCard) else into
    if not _is_pinned(host) and size > 1 << 10:
        CARD.bytes[f"{way}, pageable"] += size
    CARD.bytes[way] += size
    if non_blocking and _is_pinned(host) and (isinstance(target, OnCard) or into.dtype == out_of.dtype):
        stream.put(lambda: into.copy_(out_of))
    elif isinstance(target, OnCard):  # pageable memory is read before the call returns, and the copy is made in order
        kept = out_of.clone()
        stream.put(lambda: into.copy_(kept))
        CARD.waits["copy to the card"] += not non_blocking
    else:
        CARD.waits["copy from the card"] += 1
        stream.run()
        into.copy_(out_of)
    return target


_library = torch.library.Library("aten", "IMPL")


def _factory(name: str, make: Callable[..., torch.Tensor], *, launches: bool = True) -> None:
    def on_card(*args: Any, device: Any = None, pin_memory: Any = None, layout: Any = None, **more: Any) -> OnCard:
        CARD.launches[name] += launches
        return OnCard(make(*args, **more))

    _library.impl(name, on_card, "PrivateUse1")


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None) -> torch.Tensor:
    return _garbage(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None) -> torch.Tensor:
    return _garbage(torch.empty_strided(size, stride, dtype=dtype))


_factory("empty.memory_format", _empty, launches=False)
_factory("empty_strided", _empty_strided, launches=False)
for _name in ("arange", "arange.start", "arange.start_step"):
    _factory(_name, torch.arange)
_library.impl(
    "_copy_from", lambda source, target, non_blocking=False: _copy(target, source, non_blocking), "PrivateUse1"
)

_new = torch.empty
_device_constructors()  # `with torch.device(…)` looks once which functions make tensors: not while one is replaced


def pinning_empty(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
    """`torch.empty` for a test's time: torch asks the device for pinned memory, which takes C++."""
    made = _new(*size, **more)
    if pin_memory:
        CARD.pinned.append(made)
    return made
