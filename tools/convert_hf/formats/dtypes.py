"""Element types and their three names: torch's (used throughout), safetensors' and the torch storage class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    name: str  # torch's name without the prefix
    safetensors: str
    storage: str  # torch class that a pickle names
    itemsize: int


_ALL = (
    DType("float64", "F64", "DoubleStorage", 8),
    DType("float32", "F32", "FloatStorage", 4),
    DType("bfloat16", "BF16", "BFloat16Storage", 2),
    DType("float16", "F16", "HalfStorage", 2),
    DType("int64", "I64", "LongStorage", 8),
    DType("int32", "I32", "IntStorage", 4),
    DType("int16", "I16", "ShortStorage", 2),
    DType("int8", "I8", "CharStorage", 1),
    DType("uint8", "U8", "ByteStorage", 1),
    DType("bool", "BOOL", "BoolStorage", 1),
)
BY_NAME = {d.name: d for d in _ALL}
BY_SAFETENSORS = {d.safetensors: d for d in _ALL}
BY_STORAGE = {d.storage: d for d in _ALL}

WEIGHT_DTYPES = ("bfloat16", "float16", "float32")  # types of weights that are supported
ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"} | {n: n for n in WEIGHT_DTYPES}
