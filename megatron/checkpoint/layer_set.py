"""Which layer files a checkpoint must have. Without torch, for checks on a login node."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron.layout import LlamaShape, TensorRow, layer_file_name, layer_files

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")


def expected_files(shape: LlamaShape, tp: int) -> dict[str, tuple[TensorRow, ...]]:
    """Rows of the layout table by the name of every layer file that a checkpoint of this shape must have."""
    return {layer_file_name(index, tp_rank): rows for index, _, rows in layer_files(shape) for tp_rank in range(tp)}


def stored_tp(names: Iterable[str]) -> int | None:
    """The tensor-parallel size that wrote a set of files; None if there is no layer file among them."""
    return max((1 + int(match[2]) for name in names if (match := _LAYER_FILE.fullmatch(name))), default=None)


def set_problems(names: set[str], shape: LlamaShape, tp: int) -> list[str]:
    """Problems of the set of layer files in a checkpoint: another TP, missing or foreign files."""
    matches = {name for name in names if _LAYER_FILE.fullmatch(name)}
    found = stored_tp(matches)
    if found is None:
        return ["there is no layer file (layer_XX-model_YY-model_states.pt)"]
    if found != tp:
        return [
            f"its layer files are for model_parallel_size {found}, the configuration says {tp}: set it to "
            f"{found}, or write the weights anew with `python tools/convert_hf reshard --tp {tp}`"
        ]
    expected = expected_files(shape, tp)
    problems = [f"{name} is missing" for name in expected if name not in matches]
    return problems + [
        f"{name} belongs to no layer of a model with num_layers {shape.num_layers}"
        + (" and tied embeddings" if shape.tied else "")
        for name in sorted(matches - expected.keys())
    ]
