"""Recognizes checkpoints of other programs: one line says what a folder is and which command reads it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron.common.errors import CheckpointError

_TO_NEOX = "convert it: python tools/convert_hf to-neox --input {folder} --output NEW --tp N, then --load NEW"
# (pattern of a file's name, what a folder with such a file is, what to do); the first match counts
_KINDS = (
    (r"layer_\d+-model_\d+-model_states\.pt", "", ""),
    (
        r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt",
        "a DeepSpeed ZeRO-3 checkpoint, as the Hugging Face Trainer writes it",
        "its weights are sharded; join them with the zero_to_fp32.py beside it, copy config.json and the tokenizer "
        "there, then " + _TO_NEOX.replace("{folder}", "THAT_FOLDER").replace("convert it", "convert them"),
    ),
    (
        r"mp_rank_\d+_model_states\.pt",
        "GPT-NeoX's sequential layout (pipe_parallel_size 0), without layer files",
        "write layer files: python tools/convert_hf reshard --input {folder} --output NEW --tp N, then --load NEW "
        "--finetune true",
    ),
    (r".*\.safetensors(\.index\.json)?|pytorch_model.*", "a Hugging Face folder", _TO_NEOX),
    (r"consolidated\.\d+\.pth", "Meta's release of a Llama", _TO_NEOX),
    (
        r"model_optim_rng\.pt|.*\.distcp|common\.pt",
        "a checkpoint of Megatron-LM",
        "it is not read; export it to Hugging Face with Megatron's own tools, then convert that",
    ),
    (
        r"adapter_config\.json",
        "a peft adapter",
        "it holds no base weights; load the base, and give lora.load: {folder}",
    ),
)
_MEGATRON_RANK = re.compile(r"mp_rank_\d+(_\d+)?|iter_\d+")


def refuse_foreign(folder: Path, sequential: bool = False) -> None:
    """Raise CheckpointError for a folder without layer files: what it is, and which command reads it.

    `sequential`: accept GPT-NeoX's sequential layout, too, which the converter reads.
    """
    names = sorted(os.listdir(folder))
    for pattern, what, advice in _KINDS:
        if any(re.fullmatch(pattern, name) for name in names):
            if not what or (sequential and "sequential" in what):
                return
            raise CheckpointError(f"{folder} is {what}: {advice.replace('{folder}', str(folder))}")
    if any(_MEGATRON_RANK.fullmatch(name) and (folder / name).is_dir() for name in names):
        _, what, advice = next(kind for kind in _KINDS if "Megatron-LM" in kind[1])
        raise CheckpointError(f"{folder} is {what}: {advice}")
    if "latest" in names or any(re.fullmatch(r"global_step\d+", name) for name in names):
        return
    holds = f"it holds {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" if names else "it is empty"
    raise CheckpointError(
        f"{folder} is no checkpoint: {holds}; expected layer files (layer_XX-model_YY-model_states.pt), or the folder "
        f"above them with `latest` and `global_stepN`"
    )
