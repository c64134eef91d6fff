"""Observable behavior of the program for fixed inputs: commands, files and printed text.

Nothing of the program is imported, so the same observations can be made with any version of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
INPUTS = Path(__file__).parent / "inputs"
CONFIGS = [str(INPUTS / "model.yml"), str(INPUTS / "run.yml")]
LAYOUTS = {
    "one_rank": ["--num_gpus", "1"],
    "tp2_pp2_dp2": ["--num_gpus", "8", "--model_parallel_size", "2", "--pipe_parallel_size", "2"],
}
FIRST_HALF, STEPS = 10, 20
LOSS, NORM = "train/lm_loss", "train/grad_norm"

# Files that form a run together; every YAML file is also read alone.
RUNS = {
    "70b_cpt_frontier": ["llama31_70b/model.yml", "llama31_70b/cpt.yml", "llama31_70b/frontier.yml"],
    "70b_cpt_lumi": ["llama31_70b/model.yml", "llama31_70b/cpt.yml", "llama31_70b/lumi.yml"],
    "70b_sft_frontier": ["llama31_70b/model.yml", "llama31_70b/sft.yml", "llama31_70b/frontier.yml"],
    "tiny": ["tiny/model.yml", "tiny/run.yml", "tiny/local.yml"],
    "8b": ["llama31_8b/model.yml", "tiny/run.yml", "tiny/local.yml"],
    "1b": ["llama32_1b/model.yml", "tiny/run.yml", "tiny/local.yml"],
    "astrosage_cpt": ["tiny/model.yml", "../examples/astrosage/cpt.yml", "../examples/astrosage/local.yml"],
    "astrosage_sft": ["tiny/model.yml", "../examples/astrosage/sft.yml", "../examples/astrosage/local.yml"],
}


def command(*words: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` with one thread per process, which fixes the order of summation."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def succeed(*words: object, folder: Path = ROOT) -> str:
    """Standard output of a command that must succeed."""
    done = command(*words, folder=folder)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# --- configuration and plan


def printed_configurations() -> dict[str, Any]:
    """`--print-config` of every shipped YAML file alone, and of the files that form a run, as one mapping each.

    A file that is not a complete training configuration is refused; only its exit code is recorded.
    """
    configs = ROOT / "configs"
    sets = {name: [configs / file for file in files] for name, files in RUNS.items()}
    shipped = [*configs.rglob("*.yml"), *(ROOT / "examples/astrosage").glob("*.yml")]
    sets |= {str(path.relative_to(ROOT)): [path] for path in sorted(shipped) if path.name != "rules.yml"}
    # `precision: auto` depends on the CPU.
    options = ("--precision", "bfloat16", "--print-config")
    words = [["train.py", *map(str, files), *options] for files in sets.values()]
    ended = json.loads(succeed("-c", MANY, ROOT / "deepy.py", json.dumps(words)))
    return {name: code or printed_configuration(text) for name, (code, text) in zip(sets, ended, strict=True)}


# deepy.py once for each list of arguments, in one process: most of its time is imports. Prints exit codes and outputs.
MANY = """
import contextlib, io, json, runpy, sys
deepy, runs, ended = sys.argv[1], json.loads(sys.argv[2]), []
for words in runs:
    sys.argv[1:], printed, code = words, io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_path(deepy, run_name="__main__")
        except SystemExit as end:
            code = end.code
    ended.append((code, printed.getvalue()))
print(json.dumps(ended))
"""


def printed_configuration(text: str) -> dict[str, Any]:
    return {key: value for part in yaml.safe_load_all(text) for key, value in (part or {}).items()}


def plan_of_the_70b() -> dict[str, Any]:
    """The 70B's `--dry-run --json` on 2,048 GCDs of Frontier."""
    files = [ROOT / "configs" / file for file in RUNS["70b_cpt_frontier"]]
    return json.loads(succeed(ROOT / "deepy.py", "train.py", *files, "--dry-run", "--json", "--paths-on-nodes"))


# --- data


def make_tokens(folder: Path) -> dict[str, str]:
    """Write tokens of the committed text to `folder`; returns hashes of the two files."""
    shutil.copy(INPUTS / "tokenizer.json", folder)
    succeed(
        *(ROOT / "tools/datasets/preprocess_data.py", "--input", INPUTS / "text.jsonl", "--output-prefix", "tokens"),
        *("--vocab-file", "tokenizer.json", "--tokenizer-type", "HFTokenizer", "--append-eod", "--workers", 1),
        folder=folder,
    )
    return hashes(folder, "tokens_text_document.bin", "tokens_text_document.idx")


# --- conversion


def write_hugging_face_model(folder: Path) -> None:
    """Random weights of the small model in a Hugging Face folder; numpy's legacy generator never changes."""
    folder.mkdir(parents=True)
    keys = yaml.safe_load((INPUTS / "model.yml").read_text())
    hidden, width, vocab = keys["hidden_size"], keys["intermediate_size"], keys["vocab_size"]
    kv = hidden // keys["num_attention_heads"] * keys["num_kv_heads"]
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(keys["num_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (width, hidden),
                "mlp.up_proj": (width, hidden),
                "mlp.down_proj": (hidden, width),
            }.items()
        }
    random = np.random.RandomState(0)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in sorted(shapes.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": keys["num_layers"],
        "num_attention_heads": keys["num_attention_heads"],
        "num_key_value_heads": keys["num_kv_heads"],
        "max_position_embeddings": keys["max_position_embeddings"],
        "rms_norm_eps": keys["rms_norm_epsilon"],
        "rope_scaling": None,
        "rope_theta": float(keys["rotary_emb_base"]),
        "tie_word_embeddings": False,
        "vocab_size": vocab,
        "torch_dtype": "float32",
        "attention_bias": False,
        "mlp_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def converted(folder: Path) -> dict[str, dict[str, str]]:
    """Hashes of the weights that to-neox, reshard and to-hf write."""
    write_hugging_face_model(folder / "hf")
    convert = (ROOT / "tools/convert_hf",)
    divisible = ("--vocab-divisible-by", 1, "--quiet")
    succeed(*convert, "to-neox", "--input", "hf", "--output", "neox", "--tp", 2, *divisible, folder=folder)
    succeed(*convert, "reshard", "--input", "neox", "--output", "neox4", "--tp", 1, "--quiet", folder=folder)
    succeed(*convert, "to-hf", "--input", "neox", "--output", "back", "--quiet", folder=folder)
    return {
        "to-neox": weight_hashes(folder / "neox"),
        "reshard": weight_hashes(folder / "neox4"),
        "to-hf": weight_hashes(folder / "back"),
    }


# --- training


def train(folder: Path, layout: str, *arguments: object) -> dict[str, list[float]]:
    """Loss and gradient norm of every step of a run in `folder`, which holds its tokens."""
    deepy = (ROOT / "deepy.py", ROOT / "train.py", *CONFIGS, *LAYOUTS[layout])
    succeed(*deepy, *arguments, folder=folder)
    records = [json.loads(line) for line in (folder / "logs/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if LOSS in record]
    return {key: [record[key] for record in steps] for key in (LOSS, NORM)}


def manifest_keys(checkpoint: Path) -> dict[str, Any]:
    """The structure of a manifest: names of files, keys of an entry of each kind, keys of the provenance."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = manifest.pop("files")
    layer = next(entry for name, entry in files.items() if name.startswith("layer_"))
    return {
        "top": sorted(manifest),
        "provenance": sorted(manifest["provenance"]),
        "files": sorted(files),
        "entry": sorted(layer),
        "tensor": sorted(next(iter(layer["tensors"].values()))),
    }


def meta_keys(checkpoint: Path) -> list[str]:
    """Keys of DeepSpeed's file for the first stage."""
    import torch

    return sorted(torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=True))


def hashes(folder: Path, *names: str) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def weight_hashes(folder: Path) -> dict[str, str]:
    """Hashes of layer files and safetensors below `folder`, by path."""
    found = (*folder.rglob("layer_*.pt"), *folder.rglob("*.safetensors"))
    paths = sorted(path for path in found if "optim_states" not in path.name)
    return hashes(folder, *(str(path.relative_to(folder)) for path in paths))


def machine() -> dict[str, str]:
    """The software and CPU features that the bits of a run depend on."""
    import torch

    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vendor = re.search(r"^vendor_id\s*: (.*)$", cpu, re.MULTILINE)
    return {
        "torch": torch.__version__.partition("+")[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendor[1] if vendor else "unknown",
    }
