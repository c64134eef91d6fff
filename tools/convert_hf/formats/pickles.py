"""Pickles as data: a reader that cannot run code and a writer for a dict of tensors. Neither imports torch.

The reader is a small interpreter of the opcodes that `torch.save` uses. A GLOBAL becomes a `Name`, never an import;
only the names below may be called, and a call builds a description. Anything else is rejected by name, so a pickle
that carries code raises an error and executes nothing.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConvertError
from .dtypes import BY_STORAGE, DType
from .stored import Shape

MAX_STEPS = 5_000_000  # opcodes; a real state dict of a 405B model has fewer than 100,000


@dataclass(frozen=True)
class Name:
    """A global named by a pickle; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """Storage of a torch file: record `data/{key}`, `numel` elements."""

    key: str
    dtype: DType
    numel: int


@dataclass(frozen=True)
class TensorView:
    """A tensor of a torch file: a view of a storage, offset and strides in elements."""

    storage: Storage
    offset: int
    shape: Shape
    stride: tuple[int, ...]


@dataclass
class Inert:
    """An object of a class that the converter does not need (random state, arguments, ...): never constructed."""

    kind: Name
    state: Any = field(default=None, repr=False)


# Classes that meta files of DeepSpeed and GPT-NeoX may hold in addition to tensors; they stay `Inert`.
_INERT_MODULES = ("numpy", "argparse", "deepspeed", "megatron", "_codecs", "torch")
_INERT_NAMES = {
    Name("__builtin__", "set"),
    Name("builtins", "set"),
    Name("collections", "defaultdict"),
    Name("pathlib", "PosixPath"),
}
_ORDERED_DICT = Name("collections", "OrderedDict")
_REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = Name("torch._utils", "_rebuild_parameter")
_SIZE = Name("torch", "Size")
_MARK = object()


def read_pickle(data: bytes, where: str, inert: bool = False) -> Any:
    """Decode a pickle, with a `TensorView` for each tensor. ConvertError names `where`.

    With `inert`, objects of the classes that training frameworks store alongside weights become `Inert`; without it
    the pickle may hold only containers, numbers, strings and tensors.
    """
    try:
        return _Reader(data, where, inert).run()
    except ConvertError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error, RecursionError) as error:
        raise ConvertError(f"{where} is not a readable pickle ({type(error).__name__}: {error})") from None


class _Reader:
    def __init__(self, data: bytes, where: str, inert: bool) -> None:
        self.data, self.where, self.inert = data, where, inert
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise ConvertError(f"{self.where} ends in the middle of a pickle; it is truncated, copy it again")
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        text = self.take(end - self.position).decode()
        self.position += 1
        return text

    def since_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise ValueError("no mark")

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            opcode = self.take(1)
            if opcode == b".":
                result = self.stack.pop()
                if self.stack or result is _MARK:
                    raise ValueError("objects are left over")
                return result
            self.step(opcode)
        raise ConvertError(f"{self.where}: the pickle has more than {MAX_STEPS} operations")

    def step(self, op: bytes) -> None:
        stack = self.stack
        match op:
            case b"\x80":
                if self.number("<B") > 5:
                    raise ValueError("unknown protocol")
            case b"\x95":  # FRAME
                self.take(8)
            case b"}":
                stack.append({})
            case b"]":
                stack.append([])
            case b")":
                stack.append(())
            case b"\x8f":  # EMPTY_SET
                stack.append([])
            case b"(":
                stack.append(_MARK)
            case b"N":
                stack.append(None)
            case b"\x88":
                stack.append(True)
            case b"\x89":
                stack.append(False)
            case b"K":
                stack.append(self.number("<B"))
            case b"M":
                stack.append(self.number("<H"))
            case b"J":
                stack.append(self.number("<i"))
            case b"\x8a":  # LONG1
                stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True))
            case b"G":
                stack.append(struct.unpack(">d", self.take(8))[0])
            case b"X":
                stack.append(self.take(self.number("<I")).decode("utf-8", "surrogatepass"))
            case b"\x8c":
                stack.append(self.take(self.number("<B")).decode("utf-8", "surrogatepass"))
            case b"\x8d":
                stack.append(self.take(self.number("<Q")).decode("utf-8", "surrogatepass"))
            case b"U" | b"C":  # SHORT_BINSTRING, SHORT_BINBYTES
                stack.append(self.take(self.number("<B")))
            case b"B":
                stack.append(self.take(self.number("<I")))
            case b"q":
                self.memo[self.number("<B")] = stack[-1]
            case b"r":
                self.memo[self.number("<I")] = stack[-1]
            case b"\x94":  # MEMOIZE
                self.memo[len(self.memo)] = stack[-1]
            case b"h":
                stack.append(self.memo[self.number("<B")])
            case b"j":
                stack.append(self.memo[self.number("<I")])
            case b"t":
                stack.append(tuple(self.since_mark()))
            case b"\x85" | b"\x86" | b"\x87":
                count = op[0] - 0x84
                items = tuple(stack[-count:])
                if len(items) < count or _MARK in items:
                    raise ValueError("stack is too short")
                stack[-count:] = [items]
            case b"a":
                value = stack.pop()
                self.container(list).append(value)
            case b"e":
                values = self.since_mark()
                self.container(list).extend(values)
            case b"\x90":  # ADDITEMS
                values = self.since_mark()
                self.container(list).extend(values)
            case b"s":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case b"u":
                self.set_items(self.since_mark())
            case b"c":
                module = self.line()
                stack.append(self.named(Name(module, self.line())))
            case b"\x93":  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise ValueError("a global without a name")
                stack.append(self.named(Name(module, name)))
            case b"Q":
                stack.append(self.storage(stack.pop()))
            case b"R" | b"\x81":  # REDUCE, NEWOBJ
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.apply(function, arguments))
            case b"b":  # BUILD
                state = stack.pop()
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state
                elif not isinstance(stack[-1], dict | TensorView):
                    raise ValueError(f"state for a {type(stack[-1]).__name__}")
            case _:
                raise ValueError(f"opcode {op!r} at byte {self.position - 1} is not one that torch.save writes")

    def container(self, kind: type) -> Any:
        top = self.stack[-1]
        if isinstance(top, Inert):
            return []
        if not isinstance(top, kind):
            raise ValueError(f"a {kind.__name__} is expected")
        return top

    def set_items(self, items: list[Any]) -> None:
        target = self.container(dict)
        if len(items) % 2 or _MARK in items:
            raise ValueError("keys without values")
        if isinstance(self.stack[-1], Inert):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str) and key in target:
                raise ConvertError(f"{self.where}: the name {key!r} appears twice")
            target[key] = value

    def named(self, name: Name) -> Name:
        known = name in (_ORDERED_DICT, _REBUILD, _REBUILD_PARAMETER, _SIZE) or (
            name.module == "torch" and name.name in BY_STORAGE
        )
        inert = name in _INERT_NAMES or name.module.split(".")[0] in _INERT_MODULES
        if known or (self.inert and inert):
            return name
        raise ConvertError(
            f"{self.where} names {name}, which is not data: a weight file must hold tensors only. "
            f"No code was run; get the file from a source that you trust, as safetensors if available"
        )

    def storage(self, identifier: Any) -> Storage:
        kind, name, key, _, numel = identifier
        if kind != "storage" or not isinstance(name, Name) or name.name not in BY_STORAGE or not isinstance(key, str):
            raise ValueError("a storage of unknown type")
        if not isinstance(numel, int) or numel < 0:
            raise ValueError("a storage without a size")
        return Storage(key, BY_STORAGE[name.name], numel)

    def apply(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise ValueError("arguments are not a tuple")
        if function == _ORDERED_DICT and not arguments:
            return {}
        if function == _SIZE:
            return tuple(arguments[0])
        if function == _REBUILD:
            storage, offset, shape, stride = arguments[:4]
            sizes = (offset, *shape, *stride)
            if not isinstance(storage, Storage) or not all(isinstance(n, int) and n >= 0 for n in sizes):
                raise ValueError("a tensor without a valid storage, offset, shape or stride")
            if len(shape) != len(stride) or len(shape) > 8:
                raise ValueError("shape and stride disagree")
            return TensorView(storage, offset, tuple(shape), tuple(stride))
        if function == _REBUILD_PARAMETER and isinstance(arguments[0], TensorView):
            return arguments[0]
        if self.inert and isinstance(function, Name):
            return Inert(function)
        raise ConvertError(f"{self.where} calls {function}, which is not data; no code was run")


def tensors_pickle(tensors: list[tuple[str, DType, Shape]]) -> bytes:
    """Pickle of a flat dict name -> tensor, where tensor i is the whole of record `data/{i}`."""
    out = bytearray(b"\x80\x02}(")
    for key, (name, dtype, shape) in enumerate(tensors):
        numel, stride = 1, []
        for size in reversed(shape):
            stride.append(numel)
            numel *= size
        out += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += _text("storage") + b"ctorch\n" + dtype.storage.encode() + b"\n"
        out += _text(str(key)) + _text("cpu") + _integer(numel) + b"tQ" + _integer(0)
        out += b"(" + b"".join(map(_integer, shape)) + b"t"
        out += b"(" + b"".join(map(_integer, reversed(stride))) + b"t"
        out += b"\x89ccollections\nOrderedDict\n)RtR"
    return bytes(out + b"u.")


def plain_pickle(value: Any) -> bytes:
    """Pickle of containers, numbers, strings and None."""
    return pickle.dumps(value, protocol=2)


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw
