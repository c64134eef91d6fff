"""A run from files like GPT-NeoX's: only sizes, iterations, paths and the CPU's backend are overridden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fp16 import allow_fp16
from tests.support.gpt_neox_files import LLAMA, MACHINE, TRAINING
from tests.support.ranks import run_ranks
from tests.support.token_files import random_documents

pytestmark = pytest.mark.distributed


def _train(rank: int, world_size: int, keys: dict[str, Any], fp16: bool) -> None:
    from megatron.neox_arguments import NeoXArgs
    from megatron.parallel.process_groups import form_groups
    from megatron.trainer.run import Run

    if fp16:
        allow_fp16()
    args = NeoXArgs.from_dict(keys, world_size=world_size)
    Run(args, form_groups(args)).execute()


def overridden(folder: Path) -> dict[str, Any]:
    vocabulary = {chr(97 + number): number for number in range(26)} | {"<|endoftext|>": 26}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    places = {
        "data_path": random_documents(folder / "text", 27, documents=200),
        "vocab_file": str(folder / "vocab.json"),
        "merge_file": str(folder / "merges.txt"),
        "save": str(folder / "checkpoints"),
        "log_dir": str(folder / "log"),
    }
    sizes = {"num_layers": 2, "hidden_size": 32, "seq_length": 16, "train_micro_batch_size_per_gpu": 1}
    lengths = {"train_iters": 4, "checkpoint_factor": 4, "eval_iters": 1, "log_interval": 1, "exit_interval": 3}
    start = {"load": None, "from_scratch": True, "finetune": None, "distributed_backend": "gloo"}
    return {**LLAMA, **TRAINING, **MACHINE, **places, **sizes, **lengths, **start, "log_param_norm": True}


def test_gpt_neox_files_train_and_log_its_scalars(tmp_path: Path) -> None:
    """In fp16 on two tensor-parallel ranks; `exit_interval` ends the run, which then resumes."""
    keys = overridden(tmp_path)
    run_ranks(_train, 2, keys, True)
    records = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    named = {name for record in records for name in record}
    assert {"runtime/samples_per_sec", "runtime/steps_per_sec", "runtime/flops_per_sec_per_gpu"} <= named
    assert {"validation/lm_loss", "validation/lm_loss_ppl", "train/loss_scale"} <= named
    assert {"parameter_norms/0.word_embeddings.weight", "parameter_norms/2.mlp.linear1.weight"} <= named
    assert max(record["iteration"] for record in records) == 3
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "global_step3"
    run_ranks(_train, 2, keys, True)
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "global_step4"


def test_fp16_on_a_cpu_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="precision fp16: DeepSpeed trains in fp16 on GPUs"):
        run_ranks(_train, 2, overridden(tmp_path), False)
