"""The zip file of `torch.save`: where each tensor's bytes are, and the layout of a new one.

Records are stored without compression, payloads at multiples of 64 bytes: `data.pkl` (the object), `data/0`,
`data/1`, ... (storages) and a few one-line records. Files are laid out with their final size first and filled in any
order; CRCs come last, from the CRC of each storage, so tools that check them accept the file.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConvertError
from .dtypes import DType
from .pickles import TensorView, plain_pickle, read_pickle, tensors_pickle
from .stored import Shape, Stored

_ALIGN = 64
_LIMIT = 0xFFFFFFFF
MAX_PICKLE = 256_000_000
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_DATE = (1 << 5) | 1  # 1980-01-01, so that files with equal content are equal


@dataclass
class TorchFile:
    """A torch file opened without loading its tensors: its object (with `TensorView`) and its records."""

    path: Path
    value: Any
    records: dict[str, tuple[int, int]] = field(repr=False)  # name without prefix -> (offset of payload, bytes)

    def stored(self, name: str, view: TensorView) -> Stored:
        """Location of the bytes of `view`; ConvertError if it is not contiguous or lies outside its storage."""
        where = f"{self.path}: tensor {name}"
        key = f"data/{view.storage.key}"
        if key not in self.records:
            raise ConvertError(f"{where}: record {key} is missing; the file is truncated or corrupt")
        offset, size = self.records[key]
        dtype = view.storage.dtype
        if size != view.storage.numel * dtype.itemsize:
            raise ConvertError(
                f"{where}: record {key} has {size} bytes for {view.storage.numel} elements of {dtype.name}"
            )
        expected = 1
        for length, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
            if length != 1 and stride != expected:
                raise ConvertError(f"{where} is not contiguous (shape {view.shape}, stride {view.stride})")
            expected *= length
        if view.offset + math.prod(view.shape) > view.storage.numel:
            raise ConvertError(f"{where} lies outside its storage")
        return Stored(self.path, name, offset + view.offset * dtype.itemsize, dtype, view.shape)

    def tensors(self) -> dict[str, Stored]:
        """Every tensor of a file that holds a flat dict of tensors; entries that are None are skipped.

        ConvertError if the file holds anything else, or if a tensor is not contiguous.
        """
        if not isinstance(self.value, dict):
            raise ConvertError(f"{self.path} holds a {type(self.value).__name__}, not a dict of tensors")
        for name, item in self.value.items():
            if not isinstance(name, str) or not (item is None or isinstance(item, TensorView)):
                raise ConvertError(f"{self.path}: the entry {str(name)[:80]!r} is not a tensor")
        return {name: self.stored(name, item) for name, item in self.value.items() if item is not None}


def open_torch(path: Path, inert: bool = False) -> TorchFile:
    """Read the directory and the pickle of a torch file; ConvertError if either is damaged. No code can run.

    `inert` admits objects other than tensors without building them (see `read_pickle`).
    """
    try:
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                names = [info.filename for info in infos]
                if len(set(names)) != len(names):
                    raise ConvertError(f"{path}: a record appears twice; the file is corrupt")
                pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise ConvertError(f"{path} is a zip file without exactly one data.pkl, so it is not a torch file")
                prefix = pickles[0][: -len("data.pkl")]
                records = {}
                for info in infos:
                    if not info.filename.startswith(prefix):
                        raise ConvertError(f"{path}: record {info.filename!r} does not belong to {prefix!r}")
                    records[info.filename[len(prefix) :]] = _payload(path, file, info, total)
            offset, size = records["data.pkl"]
            if size > MAX_PICKLE:
                raise ConvertError(f"{path}: data.pkl has {size} bytes, more than a state dict can need")
            file.seek(offset)
            data = file.read(size)
            order = _read(file, records.get("byteorder"))
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError, RuntimeError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(
            f"{path} is truncated, or not a torch file of torch 1.6 or newer ({error}); copy or save it again"
        ) from None
    if order not in (None, b"little"):
        raise ConvertError(
            f"{path} was written on a machine with byte order {order!r}; only little-endian is supported"
        )
    return TorchFile(path, read_pickle(data, f"{path}: data.pkl", inert), records)


def _read(file: BinaryIO, record: tuple[int, int] | None) -> bytes | None:
    if record is None:
        return None
    file.seek(record[0])
    return file.read(min(record[1], 64))


def _payload(path: Path, file: BinaryIO, info: zipfile.ZipInfo, total: int) -> tuple[int, int]:
    where = f"{path}: record {info.filename}"
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise ConvertError(f"{where} is compressed or encrypted; torch.save never does that")
    file.seek(info.header_offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != b"PK\x03\x04":
        raise ConvertError(f"{where} has no header where the directory says; the file is corrupt")
    *_, name_length, extra_length = _LOCAL.unpack(head)
    if file.read(name_length) != info.orig_filename.encode():
        raise ConvertError(f"{where} has another name in its own header; the file is corrupt")
    offset = info.header_offset + _LOCAL.size + name_length + extra_length
    if offset + info.file_size > total:
        raise ConvertError(f"{where} ends beyond the end of the file; it is truncated, copy it again")
    return offset, info.file_size


@dataclass
class _Record:
    name: str
    size: int
    crc: int | None  # None until the data are written
    header: int = 0
    payload: int = 0


class TorchLayout:
    """The layout of a torch file whose storages are filled in later.

    `offsets` and `size` are final; `blocks(crcs)` gives the bytes of everything that is not tensor data.
    """

    def __init__(self, stem: str, tensors: list[tuple[str, DType, Shape]], pickle: bytes | None = None) -> None:
        self.stem = stem
        self.names = [name for name, _, _ in tensors]
        self._fixed = {
            "data.pkl": tensors_pickle(tensors) if pickle is None else pickle,
            ".format_version": b"1",
            ".storage_alignment": b"64",
            "byteorder": b"little",
            "version": b"3\n",
        }
        self._records = [_Record(name, len(data), zlib.crc32(data)) for name, data in self._fixed.items()]
        storages = [
            _Record(f"data/{key}", math.prod(shape) * dtype.itemsize, None)
            for key, (_, dtype, shape) in enumerate(tensors)
        ]
        self._records[-1:-1] = storages  # `version` comes last
        position = 0
        for record in self._records:
            record.header = position
            bare = position + _LOCAL.size + len(self._name(record)) + len(_zip64_sizes(record))
            record.payload = -(-(bare + 4) // _ALIGN) * _ALIGN  # 4: header of the padding field
            position = record.payload + record.size
        self._directory = position
        self.size = position + len(self._tail([0] * len(tensors)))
        self.offsets = {name: record.payload for name, record in zip(self.names, storages, strict=True)}

    def _name(self, record: _Record) -> bytes:
        return f"{self.stem}/{record.name}".encode()

    def blocks(self, crcs: dict[str, int]) -> list[tuple[int, bytes]]:
        """Offset and bytes of the headers, small records and directory, given the CRC-32 of each tensor's bytes."""
        result = []
        pending = [crcs[name] for name in self.names]
        values = iter(pending)
        for record in self._records:
            crc = next(values) if record.crc is None else record.crc
            name, sizes = self._name(record), _zip64_sizes(record)
            pad = record.payload - record.header - _LOCAL.size - len(name) - len(sizes) - 4
            extra = sizes + b"FB" + struct.pack("<H", pad) + b"Z" * pad
            size = _LIMIT if sizes else record.size
            version = 45 if sizes else 20
            head = _LOCAL.pack(b"PK\x03\x04", version, 0, 0, 0, _DATE, crc, size, size, len(name), len(extra))
            result.append((record.header, head + name + extra + self._fixed.get(record.name, b"")))
        return [*result, (self._directory, self._tail(pending))]

    def _tail(self, crcs: list[int]) -> bytes:
        out, values = bytearray(), iter(crcs)
        for record in self._records:
            crc = next(values) if record.crc is None else record.crc
            name = self._name(record)
            big = [n for n in (record.size, record.size, record.header) if n >= _LIMIT]
            extra = struct.pack("<HH", 1, 8 * len(big)) + struct.pack(f"<{len(big)}Q", *big) if big else b""
            size, header = min(record.size, _LIMIT), min(record.header, _LIMIT)
            version = 45 if big else 20
            fields = (version, version, 0, 0, 0, _DATE, crc, size, size, len(name), len(extra), 0, 0, 0, 0, header)
            out += _CENTRAL.pack(b"PK\x01\x02", *fields) + name + extra
        count, length, start = len(self._records), len(out), self._directory
        if start + length >= _LIMIT or count >= 0xFFFF:
            record_at = start + length
            out += b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, length, start)
            out += b"PK\x06\x07" + struct.pack("<IQI", 0, record_at, 1)
        few = min(count, 0xFFFF)
        out += b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, few, few, min(length, _LIMIT), min(start, _LIMIT), 0)
        return bytes(out)


def _zip64_sizes(record: _Record) -> bytes:
    """The zip64 field of a local header, empty if the sizes fit in 32 bits."""
    return struct.pack("<HHQQ", 1, 16, record.size, record.size) if record.size >= _LIMIT else b""


def plain_file(stem: str, value: Any) -> bytes:
    """The bytes of a torch file that holds `value` (containers, numbers, strings, None)."""
    return b"".join(block.ljust(size, b"\0") for block, size in _spaced(TorchLayout(stem, [], plain_pickle(value))))


def _spaced(layout: TorchLayout) -> list[tuple[bytes, int]]:
    blocks = layout.blocks({})
    ends = [offset for offset, _ in blocks[1:]] + [layout.size]
    return [(block, end - offset) for (offset, block), end in zip(blocks, ends, strict=True)]
