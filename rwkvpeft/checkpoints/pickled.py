"""The plain values and tensors that a ``.pth`` describes in pickle's language, of which nothing is run.

Pickle is a program for a small machine that may call anything. This one has numbers, texts, lists, dicts and the few
words of ``torch.save``; at any other word it stops. A tensor comes out as where it lies, to be checked and mapped.

Source: Python's ``pickletools``; PyTorch's ``torch/_utils.py`` and ``torch/serialization.py``.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

# a file of 30 thousand tensors; as many instructions take a second
_MOST_INSTRUCTIONS = 1_000_000
_MOST_AXES = 64
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_OTHER_DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
# those whose numbers are whole bytes; older releases of PyTorch lack some
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*_STORAGES.values(), *(getattr(torch, name) for name in _OTHER_DTYPES if hasattr(torch, name)))
}


class PickleError(ValueError):
    """A description that is broken; the message says why, in one line."""


class ForeignError(PickleError):
    """A word that is not among those of a file of tensors; the message is the word."""


class Storage(NamedTuple):
    """A run of numbers in the file: by what name, of which type, and how many."""

    key: str
    dtype: torch.dtype
    elements: int


class StoredTensor(NamedTuple):
    """A tensor as a view of a storage; ``offset`` and ``stride`` count elements of ``dtype``."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class _Word(NamedTuple):
    """A global name, as text and nothing else."""

    name: str


class _Dict(dict[Any, Any]):
    """A dict that may be given attributes, as OrderedDict is; they are dropped."""


def read_pickle(data: io.BytesIO, seen: dict[str, Storage] | None = None) -> Any:
    """The value that the pickle at the current position of ``data`` describes; ``data`` is left behind its end.

    Args:
        seen: is given every storage by its key.
    Raises: ForeignError at a word that no file of tensors needs; PickleError for anything broken or too long.
    """
    machine = _Machine({} if seen is None else seen)
    try:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if number > _MOST_INSTRUCTIONS:
                raise PickleError(f"more than {_MOST_INSTRUCTIONS} instructions")
            if instruction.name == "STOP":
                return machine.pop()
            machine.do(instruction.name, argument)
    except PickleError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error) as reason:
        raise PickleError("a broken description of its tensors") from reason
    raise PickleError("a description of its tensors that does not end")


class _Machine:
    def __init__(self, seen: dict[str, Storage]) -> None:
        self._seen = seen
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        act = _ACTIONS.get(name)
        if act is None:
            raise ForeignError(f"instruction {name}")
        act(self, argument)

    def pop(self) -> Any:
        """Take the newest value."""
        return self._stack.pop()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        found = self._stack
        self._stack = self._outer.pop()
        return found

    def _mark(self, _: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, place: int) -> None:
        self._push(self._memo[place])

    def _tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self._push(tuple(reversed(items)))

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise PickleError("a broken list")
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if type(into) not in (dict, _Dict) or len(items) % 2:
            raise PickleError("a broken dict")
        for key, value in _pairs(items):
            into[_flat(key)] = value

    def _set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def _global(self, argument: str) -> None:
        # module and name; neither has a space
        self._push(_word(argument.replace(" ", ".")))

    def _stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self._push(_word(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a broken word"))

    def _build(self, _: Any) -> None:
        self.pop()
        if type(self._stack[-1]) is not _Dict:
            raise ForeignError("an object")

    def _reduce(self, _: Any) -> None:
        arguments, word = self.pop(), self.pop()
        if type(word) is not _Word or type(arguments) is not tuple:
            raise PickleError("a broken call")
        self._push(_CALLS.get(word.name, _no_call)(*arguments))

    def _storage(self, _: Any) -> None:
        what, kind, key, _, count, *view = self.pop()
        if what != "storage" or type(kind) is not _Word or view not in ([], [None]):
            raise PickleError("a broken reference to numbers")
        dtype = _STORAGES.get(kind.name.rpartition(".")[2])
        if dtype is None or type(key) is not str or type(count) is not int or count < 0:
            raise PickleError("a broken reference to numbers")
        storage = Storage(key, dtype, count)
        if self._seen.setdefault(key, storage) != storage:
            raise PickleError("two references to the same numbers that differ")
        self._push(storage)


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _flat(key: Any) -> Any:
    # to hash a tuple of tuples of tuples takes the C stack, without end
    if type(key) not in (str, int, float, bool, bytes, type(None)):
        raise PickleError("a dict by something else than names and numbers")
    return key


def _word(name: str) -> _Word:
    module, _, last = name.rpartition(".")
    is_storage = module in ("torch", "torch.storage") and last in _STORAGES
    if not (is_storage or name in _CALLS or name in _CLASSES or (module == "torch" and last in _DTYPES)):
        raise ForeignError(name)
    return _Word(name)


def _no_call(*_: Any) -> Any:
    raise PickleError("a broken call")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    if type(storage) is not Storage:
        raise PickleError("a tensor of nothing")
    return _checked(StoredTensor(storage, storage.dtype, offset, shape, stride))


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, trained: Any, hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    named = _DTYPES.get(dtype.name.rpartition(".")[2]) if type(dtype) is _Word else None
    if type(storage) is not Storage or named is None or storage.dtype != torch.uint8:
        raise PickleError("a tensor of nothing")
    return _checked(StoredTensor(storage, named, offset, shape, stride))


def _checked(tensor: StoredTensor) -> StoredTensor:
    """Refuse a tensor that does not lie in its storage, or is larger than that."""
    shape, stride = tensor.shape, tensor.stride
    numbers = (tensor.offset, *shape, *stride) if type(shape) is type(stride) is tuple else (-1,)
    whole = all(type(number) is int and number >= 0 for number in numbers)
    if not whole or not len(shape) == len(stride) <= _MOST_AXES:
        raise PickleError("a tensor with a broken shape")
    elements, room = tensor.elements, tensor.storage.elements * tensor.storage.dtype.itemsize // tensor.dtype.itemsize
    last = tensor.offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if elements > room or tensor.offset > room or (elements and last >= room):
        raise PickleError(f"a tensor of shape {_shown(shape)} in {room} numbers")
    # a size of 0 lets the others be anything
    if not elements and max((*shape, *stride)) >> 31:
        raise PickleError("a tensor with a broken shape")
    return tensor


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:.3g}" if size >> 40 else str(size) for size in shape[:8])


def _inner(tensor: Any, *_: Any) -> StoredTensor:
    """A parameter is its tensor; whether it was trained does not matter."""
    if type(tensor) is not StoredTensor:
        raise PickleError("a parameter of nothing")
    return tensor


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> StoredTensor:
    if type(function) is not _Word or not function.name.startswith("torch._utils.") or type(arguments) is not tuple:
        raise PickleError("a broken call")
    built: StoredTensor = _CALLS.get(function.name, _no_call)(*arguments)
    return built


def _size(sizes: tuple[int, ...] = ()) -> tuple[int, ...]:
    return sizes


def _as_it_is(text: Any, *_: Any) -> Any:
    return text


def _new_dict() -> _Dict:
    return _Dict()


_CLASSES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _inner,
    "torch._utils._rebuild_parameter_with_state": _inner,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "collections.OrderedDict": _new_dict,
    "collections.Counter": _new_dict,
    "torch.Size": _size,
    "torch.device": _as_it_is,
    # how protocol 2 writes bytes
    "_codecs.encode": _as_it_is,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine._mark,
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "TUPLE": lambda machine, _: machine._push(tuple(machine._since_mark())),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "APPEND": lambda machine, _: machine._append([machine.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._since_mark()),
    "SETITEM": _Machine._set_item,
    "SETITEMS": lambda machine, _: machine._set_items(machine._since_mark()),
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._storage,
    "MEMOIZE": _Machine._memoize,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
         "SHORT_BINBYTES", "SHORT_BINSTRING"),
        _Machine._push,
    ),
}
