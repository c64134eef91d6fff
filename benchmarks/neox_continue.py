"""Continuing a GPT-NeoX checkpoint: our next losses against its own, from its weights, optimizer states and data.

    python benchmarks/neox_continue.py --upstream DIR --python PYTHON

DIR is a checkout of EleutherAI/gpt-neox, PYTHON an interpreter that can import it (see neox_compat.py). GPT-NeoX trains
a tiny Llama on the CPU (gloo; `neox_upstream_train.py` replaces CUDA) and saves at every step. This program then
continues from step 4, at the same layout and at another, and compares the losses of the following steps. In addition,
both train for eight steps from one conversion of a Hugging Face model. The exit code is 1 if an fp32 loss differs by
more than 1e-5. `--record FOLDER` only writes the checkpoint and the losses that
`tests/checkpoint/test_gpt_neox_run.py` uses.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ranks import run_ranks_forked

STEPS, SAVED = 8, 4
MICRO_BATCHES = 2
# precision, (TP, PP, DP) of GPT-NeoX's run, layouts that continue it
CASES: list[tuple[str, tuple[int, int, int], list[tuple[int, int, int]]]] = [
    ("fp32", (1, 2, 1), [(1, 2, 1), (2, 1, 1)]),
    ("fp32", (2, 2, 2), [(2, 2, 2), (1, 4, 1)]),
    ("bfloat16", (1, 2, 2), [(1, 2, 2)]),
    ("fp16", (2, 1, 2), [(2, 1, 2), (1, 2, 1)]),
]
MEDIUM = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "intermediate_size": 96}
SMALL = {**MEDIUM, "num_layers": 2, "hidden_size": 16, "intermediate_size": 48}
RECORDED_LAYOUT = (1, 2, 2)
VOCABULARY = 32  # GPT-NeoX's loss includes the padding of the vocabulary; a multiple of 16 x TP needs none


def common_keys(folder: Path, precision: str, tp: int, pp: int, sizes: Mapping[str, int] = MEDIUM) -> dict[str, Any]:
    """Keys for both programs: the model, its data, and the optimizer."""
    model = {
        **{"norm": "rmsnorm", "rms_norm_epsilon": 1e-5, "pos_emb": "rotary", "rotary_pct": 1, "activation": "swiglu"},
        **{"no_weight_tying": True, "use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "mlp_multiple_of": 1},
        **{"seq_length": 16, "max_position_embeddings": 16, "make_vocab_size_divisible_by": 16},
        **{"attention_dropout": 0, "hidden_dropout": 0, "attention_config": [[["global"], "all"]]},
    }
    learning = {
        **{"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}}},
        **{"min_lr": 1e-4, "lr_decay_iters": STEPS, "lr_decay_style": "cosine", "warmup": 0.25, "weight_decay": 0.1},
        **{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2, "train_iters": STEPS, "seed": 1234},
    }
    scaling = {
        "loss_scale": 0,
        "initial_scale_power": 8,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    data = {
        **{"data_path": str(folder / "text"), "data_impl": "mmap", "split": "900,50,50"},
        **{"tokenizer_type": "GPT2BPETokenizer", "vocab_file": str(folder / "vocab.json")},
        **{"merge_file": str(folder / "merges.txt"), "distributed_backend": "gloo"},
        **{"model_parallel_size": tp, "pipe_parallel_size": pp},
        **{"eval_interval": 1000, "eval_iters": 1, "log_interval": 1, "checkpoint_factor": 1},
    }
    kind = {"fp32": {"precision": "fp32"}, "bfloat16": {"bf16": {"enabled": True}, "precision": "bfloat16"}}
    return {**sizes, **model, **learning, **data, **kind.get(precision, {"fp16": {"enabled": True, **scaling}})}


def make_inputs(folder: Path) -> None:
    """Write reproducible random documents and a vocabulary of single letters."""
    import numpy as np

    from megatron.data.indexed import IndexedWriter

    letters = [chr(97 + n) for n in range(26)] + [chr(65 + n) for n in range(VOCABULARY - 27)]
    (folder / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate([*letters, "<|endoftext|>"])}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    random = np.random.RandomState(0)
    writer = IndexedWriter(folder / "text", np.dtype(np.uint16))
    for size in random.randint(5, 60, 200):
        writer.add(random.randint(0, VOCABULARY, size))
    writer.finish()


def train_theirs(
    folder: Path,
    options: argparse.Namespace,
    precision: str,
    layout: tuple[int, int, int],
    sizes: Mapping[str, int] = MEDIUM,
    **start: Any,
) -> list[float]:
    """Train with GPT-NeoX into `folder`/theirs; returns the losses of its log, to six decimals."""
    # The configuration, with the keys that only GPT-NeoX needs.
    tp, pp, dp = layout
    keys = common_keys(folder, precision, tp, pp, sizes) | start
    keys |= {"save": str(folder / "theirs"), "gradient_accumulation_steps": MICRO_BATCHES, "steps_per_print": 1}
    keys |= {
        "global_num_gpus": tp * pp * dp,
        "train_batch_size": 2 * MICRO_BATCHES * dp,
        "partition_activations": False,
    }
    keys |= {"scaled_upper_triang_masked_softmax_fusion": False, "synchronize_each_layer": False}
    if precision == "fp32":
        keys = {**keys, "fp16": {"enabled": False}}
        del keys["precision"]
    (folder / "theirs.json").write_text(json.dumps(keys))
    # Start one process per rank.
    script = str(Path(__file__).with_name("neox_upstream_train.py"))
    env = {**os.environ, "PYTHONPATH": str(options.upstream.resolve()), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env |= {"WORLD_SIZE": str(tp * pp * dp), "LOCAL_SIZE": str(tp * pp * dp), "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env |= {"MASTER_PORT": str(free.getsockname()[1])}
    logs = [folder / f"theirs.{rank}.log" for rank in range(tp * pp * dp)]
    ranks = []
    for rank, log in enumerate(logs):
        command, own = (
            [options.python, script, str(folder / "theirs.json")],
            {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        with open(log, "w") as out:
            ranks.append(subprocess.Popen(command, env=env | own, stdout=out, stderr=subprocess.STDOUT, cwd=folder))
    codes = [rank.wait(timeout=300) for rank in ranks]
    losses = {}
    for log in logs:
        for match in re.finditer(r"iteration +(\d+)/.*?lm_loss: (\S+)", log.read_text()):
            losses[int(match[1])] = float(match[2])
    if any(codes) or sorted(losses) != list(range(1, STEPS + 1)):
        sys.exit(f"GPT-NeoX ended with {codes}:\n{logs[0].read_text()[-3000:]}")
    return [losses[step] for step in range(1, STEPS + 1)]


def go_on(keys: dict[str, Any], layout: tuple[int, int, int]) -> list[float]:
    """Our losses of the steps after the checkpoint given by `keys`."""
    tp, pp, dp = layout
    run_ranks_forked(_train, tp * pp * dp, keys | {"model_parallel_size": tp, "pipe_parallel_size": pp})
    records = [json.loads(line) for line in Path(keys["log_dir"], "metrics.jsonl").read_text().splitlines()]
    return [record["train/lm_loss"] for record in records if "train/lm_loss" in record]


def _train(rank: int, size: int, keys: dict[str, Any]) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from megatron.neox_arguments import NeoXArgs
    from megatron.parallel.process_groups import form_groups
    from megatron.trainer.run import Run

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if keys.get("fp16"):
        CPU_Accelerator.is_fp16_supported = lambda self: True  # torch computes it, slowly
    args = NeoXArgs.from_dict(keys, world_size=size)
    Run(args, form_groups(args)).execute()


def our_keys(
    folder: Path, out: Path, precision: str, theirs: tuple[int, int, int], dp: int, sizes: Mapping[str, int] = MEDIUM
) -> dict[str, Any]:
    """Keys of a run that continues from GPT-NeoX's step 4: GPT-NeoX's keys, and the four in docs/from-gpt-neox.md."""
    batches = MICRO_BATCHES * theirs[2] // dp  # the same global batch
    ours = {"load": str(folder / "theirs"), "iteration": SAVED, "save": str(out), "data_order": "gpt-neox"}
    return {
        **common_keys(folder, precision, *theirs[:2], sizes),
        **ours,
        **{"gradient_accumulation_steps": batches, "intermediate_size_convention": "neox", "log_dir": str(out / "log")},
        **{"checkpoint_factor": 100, "gradient_clipping": 0.0},  # DeepSpeed did not clip
    }


def from_conversion(folder: Path, options: argparse.Namespace) -> float:
    """The largest difference between the losses of both programs, from the layer files that our converter writes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = MEDIUM["intermediate_size"] // 3  # GPT-NeoX's rule
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=MEDIUM["hidden_size"],
            intermediate_size=width,
            num_hidden_layers=MEDIUM["num_layers"],
            num_attention_heads=MEDIUM["num_attention_heads"],
            num_key_value_heads=MEDIUM["num_kv_heads"],
            max_position_embeddings=16,
            rms_norm_eps=1e-5,
        )
    )
    model.save_pretrained(folder / "hf")
    root, layout = Path(__file__).resolve().parents[1], (1, 2, 1)
    converted = ["--input", str(folder / "hf"), "--output", str(folder / "converted"), "--tp", "1", "--quiet"]
    converted += ["--vocab-divisible-by", "16"]  # GPT-NeoX compares it
    subprocess.run([sys.executable, "tools/convert_hf", "to-neox", *converted], cwd=root, check=True)
    start = {"load": str(folder / "converted"), "finetune": True}
    expected = train_theirs(folder, options, "fp32", layout, **start)
    keys = our_keys(folder, folder / "ours", "fp32", layout, layout[2])
    del keys["iteration"]
    keys |= start | {"allow_high_initial_loss": True}  # random weights know nothing
    return max(abs(a - b) for a, b in zip(go_on(keys, layout), expected, strict=True))


def record(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        losses = train_theirs(folder, options, "fp32", RECORDED_LAYOUT, SMALL)
        target = options.record / f"global_step{SAVED}"
        shutil.rmtree(options.record, ignore_errors=True)
        # Skips GPT-NeoX's files about the run, which contain paths and numpy arrays and are not read.
        shutil.copytree(folder / "theirs" / target.name, target, ignore=shutil.ignore_patterns("mp_rank_*"))
        (options.record / "latest").write_text(target.name)
        (options.record / "losses.json").write_text(json.dumps(losses[SAVED:]) + "\n")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--upstream", type=Path, required=True, help="a checkout of GPT-NeoX")
    p.add_argument("--python", required=True, help="interpreter that can import it")
    p.add_argument("--record", type=Path, metavar="FOLDER", help="write the test inputs and stop")
    options = p.parse_args()
    if options.record:
        record(options)
        return 0
    wrong = 0
    for precision, theirs, layouts in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_inputs(folder)
            expected = train_theirs(folder, options, precision, theirs)
            for number, layout in enumerate(layouts):
                out = folder / f"ours{number}"
                losses = go_on(our_keys(folder, out, precision, theirs, layout[2]), layout)
                differences = [abs(a - b) for a, b in zip(losses, expected[SAVED:], strict=True)]
                wrong += precision == "fp32" and max(differences) > 1e-5
                shown = ", ".join(f"{difference:.1e}" for difference in differences)
                print(f"{precision}: TP, PP, DP {theirs} -> {layout}: next losses differ by {shown}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        difference = from_conversion(Path(name), options)
        wrong += difference > 1e-5
        print(f"fp32, from one conversion: {STEPS} losses differ by at most {difference:.1e}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
