"""Conversion compared with `cp` of the same bytes and with loading the whole model, in one run on one disk.

    python benchmarks/conversion.py --work DIR [--size 1b] [--rounds 5] [--tp 2]

Creates a random Llama-3.1 of the chosen size, then runs the tools in turn for several rounds, each in its own process
and with the input's pages dropped from the cache first. Time is from start to the last byte on disk: every output file
is synced, by `sync` for `cp`, by the tool itself and again by `sync` for the others. Memory is the peak of anonymous
pages over the process tree, so the page cache is not included. Absolute times mean little on a shared machine; compare
the ratio to `cp` in the same round.

The load-everything tools are the straightforward scripts with `transformers` and `torch.save`: load the model into
memory, regroup the tensors, write one file after another.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {  # layers, hidden, MLP, heads, key/value heads, vocabulary
    "tiny": (4, 256, 1024, 8, 2, 4096),
    "1b": (12, 2048, 8192, 32, 8, 128256),
    "8b": (32, 4096, 14336, 32, 8, 128256),
}
ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
CHUNK = 1 << 24
TO_NEOX = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
source, target, tp = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
target.mkdir(parents=True)
state = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
layers = 1 + max(int(n.split(".")[2]) for n in state if ".layers." in n)
files = {}
for r in range(tp):
    def rows(name): return state[name].chunk(tp)[r]
    def cols(name): return state[name].chunk(tp, dim=1)[r]
    files[0, r] = {"word_embeddings.weight": rows("model.embed_tokens.weight").clone()}
    for i in range(layers):
        p = f"model.layers.{i}."
        files[i + 2, r] = {
            "input_layernorm.scale": state[p + "input_layernorm.weight"],
            "attention.query_key_value.weight": torch.cat([rows(f"{p}self_attn.{x}_proj.weight") for x in "qkv"]),
            "attention.dense.weight": cols(p + "self_attn.o_proj.weight").contiguous(),
            "post_attention_layernorm.scale": state[p + "post_attention_layernorm.weight"],
            "mlp.linear1.weight": torch.cat([rows(p + "mlp.up_proj.weight"), rows(p + "mlp.gate_proj.weight")]),
            "mlp.linear2.weight": cols(p + "mlp.down_proj.weight").contiguous(),
        }
    files[layers + 3, r] = {"norm.scale": state["model.norm.weight"]}
    files[layers + 4, r] = {"final_linear.weight": rows("lm_head.weight").clone()}
for (i, r), tensors in files.items():
    torch.save(tensors, target / f"layer_{i:02d}-model_{r:02d}-model_states.pt")
"""
TO_HF = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
source, target, hf = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
config = AutoConfig.from_pretrained(hf)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
h, d = config.hidden_size, config.hidden_size // config.num_attention_heads
def load(i):
    return [torch.load(p, weights_only=True) for p in sorted(source.glob(f"layer_{i:02d}-*"))]
state = {"model.embed_tokens.weight": torch.cat([t["word_embeddings.weight"] for t in load(0)])}
for i in range(config.num_hidden_layers):
    p, ranks = f"model.layers.{i}.", load(i + 2)
    tp = len(ranks)
    kv = config.num_key_value_heads * d // tp
    split = [t["attention.query_key_value.weight"].split([h // tp, kv, kv]) for t in ranks]
    for x, name in enumerate("qkv"):
        state[f"{p}self_attn.{name}_proj.weight"] = torch.cat([s[x] for s in split])
    state[p + "self_attn.o_proj.weight"] = torch.cat([t["attention.dense.weight"] for t in ranks], 1)
    for x, name in enumerate(("up", "gate")):
        state[f"{p}mlp.{name}_proj.weight"] = torch.cat([t["mlp.linear1.weight"].chunk(2)[x] for t in ranks])
    state[p + "mlp.down_proj.weight"] = torch.cat([t["mlp.linear2.weight"] for t in ranks], 1)
    for name in ("input_layernorm", "post_attention_layernorm"):
        state[f"{p}{name}.weight"] = ranks[0][f"{name}.scale"]
state["model.norm.weight"] = load(config.num_hidden_layers + 3)[0]["norm.scale"]
state["lm_head.weight"] = torch.cat([t["final_linear.weight"] for t in load(config.num_hidden_layers + 4)])
model.load_state_dict(state, assign=True)
model.save_pretrained(target, max_shard_size="5GB")
"""


@dataclass
class Run:
    tool: str
    seconds: float
    cpu: float
    anonymous_mib: float
    read: int  # bytes from the disk
    written: int  # bytes to the disk
    output: int  # bytes of the output
    ratio: float = 0.0  # to `cp` of the same round


def make_fixture(folder: Path, size: str) -> None:
    """A random Llama in bf16, written chunk by chunk into four shards; norms are 1 + 0.1 x N."""
    import numpy as np
    import torch

    from tools.convert_hf.formats.dtypes import BY_NAME
    from tools.convert_hf.formats.safetensors_file import file_layout

    # Names and shapes of all tensors.
    layers, h, f, heads, kv, vocabulary = SIZES[size]
    d = h // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, h)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        shapes |= {f"{p}self_attn.{x}_proj.weight": (n * d, h) for x, n in (("q", heads), ("k", kv), ("v", kv))}
        shapes |= {p + "self_attn.o_proj.weight": (h, h), p + "mlp.gate_proj.weight": (f, h)}
        shapes |= {p + "mlp.up_proj.weight": (f, h), p + "mlp.down_proj.weight": (h, f)}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (vocabulary, h)}
    # The shards, in chunks that bound memory.
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    bf16 = BY_NAME["bfloat16"]
    names, weight_map = list(shapes), {}
    for shard in range(4):
        part = names[shard * len(names) // 4 : (shard + 1) * len(names) // 4]
        file_name = f"model-{shard + 1:05d}-of-00004.safetensors"
        header, offsets, total = file_layout([(n, bf16, shapes[n]) for n in part])
        with open(folder / file_name, "wb") as file:
            file.write(header)
            for name in part:
                assert file.tell() == offsets[name]
                if len(shapes[name]) == 1:
                    values = torch.from_numpy(1 + 0.1 * generator.standard_normal(shapes[name], dtype=np.float32))
                    file.write(values.bfloat16().view(torch.uint8).numpy().tobytes())
                    continue
                left = shapes[name][0] * shapes[name][1]
                while left:
                    count = min(left, CHUNK)
                    # Random mantissas and signs, exponents of values around 0.01: cheap, and every byte differs.
                    bits = generator.integers(0, 1 << 16, count, dtype=np.uint16)
                    file.write(((bits & 0x80FF) | 0x3C00).astype(np.uint16).tobytes())
                    left -= count
            file.flush()
            os.fsync(file.fileno())
            assert file.tell() == total
        weight_map |= dict.fromkeys(part, file_name)
    # The small files of a Hugging Face folder.
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": h,
        "initializer_range": 0.02,
        "intermediate_size": f,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-05,
        "rope_scaling": ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}) + "\n")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    vocab = {f"t{i}": i for i in range(vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocab}}))


def forget(folder: Path) -> None:
    """Drop only this folder's pages from the cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def anonymous_mib(pid: int) -> float:
    """Current anonymous memory, private and shared, of a process and its children."""
    total, waiting = 0.0, [pid]
    while waiting:
        current = waiting.pop()
        try:
            with open(f"/proc/{current}/status") as file:
                lines = [line.split() for line in file if line.startswith(("RssAnon", "RssShmem"))]
                total += sum(int(line[1]) for line in lines) / 1024
            with open(f"/proc/{current}/task/{current}/children") as file:
                waiting += [int(word) for word in file.read().split()]
        except OSError:
            continue
    return total


def run_tool(tool: str, command: list[str], source: Path, target: Path) -> Run:
    """Run a command that writes `target`, with a cold input, and sync its output."""
    if target.exists():
        shutil.rmtree(target)
    forget(source)
    peak, done = [0.0], threading.Event()
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_mib(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    sync_files(target)
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{tool} failed:\n{errors.decode()[-2000:]}")
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    cpu = usage.ru_utime + usage.ru_stime
    return Run(tool, seconds, cpu, peak[0], usage.ru_inblock * 512, usage.ru_oublock * 512, size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the fixture and the outputs")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--threads", type=int, default=4, help="copying threads of the converter")
    parser.add_argument("--no-baseline", action="store_true", help="skip the load-everything tools")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    options = parser.parse_args()
    work: Path = options.work
    hf = work / f"hf_{options.size}"
    if not (hf / "tokenizer.json").exists():
        shutil.rmtree(hf, ignore_errors=True)
        make_fixture(hf, options.size)
    neox, out = work / "neox", work / "out"
    converter = [sys.executable, str(ROOT / "tools" / "convert_hf")]
    copying = ["--threads", str(options.threads), "--quiet"]
    to_neox = [*converter, "to-neox", "--input", str(hf), "--tp", str(options.tp), *copying]
    to_hf = [*converter, "to-hf", "--input", str(neox), *copying]
    shutil.rmtree(neox, ignore_errors=True)
    subprocess.run([*to_neox, "--output", str(neox)], check=True, stdout=subprocess.DEVNULL)
    layers = next(neox.glob("global_step*"))
    tools: list[tuple[str, str, list[str], Path]] = [
        ("HF -> NeoX", "cp", ["cp", "-r", str(hf), str(out)], hf),
        ("HF -> NeoX", "convert_hf to-neox", [*to_neox, "--output", str(out)], hf),
        ("NeoX -> HF", "cp", ["cp", "-r", str(neox), str(out)], neox),
        ("NeoX -> HF", "convert_hf to-hf", [*to_hf, "--output", str(out)], neox),
    ]
    if not options.no_baseline:
        python = [sys.executable, "-c"]
        loads_neox = [*python, TO_NEOX, str(hf), str(out), str(options.tp)]
        loads_hf = [*python, TO_HF, str(layers), str(out), str(hf)]
        tools.insert(2, ("HF -> NeoX", "load everything", loads_neox, hf))
        tools.append(("NeoX -> HF", "load everything", loads_hf, neox))
    runs: dict[tuple[str, str], list[Run]] = {(task, tool): [] for task, tool, _, _ in tools}
    check(out, hf, neox, [*to_hf, "--output", str(out)])
    for number in range(options.rounds):
        # A different order each round: on virtual machines some positions cost twice the system time.
        order = random.Random(number).sample(tools, len(tools))
        done = {(task, tool): run_tool(tool, command, source, out) for task, tool, command, source in order}
        for task, tool, _, _ in tools:
            run = done[task, tool]
            run.ratio = run.seconds / done[task, "cp"].seconds
            runs[task, tool].append(run)
            print(f"round {number + 1}: {task}, {tool}: {run.seconds:.1f} s, {run.ratio:.2f} x cp", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    print_table(runs, options.size, options.tp)
    if options.json:
        everything = {f"{task}: {tool}": [asdict(r) for r in all_] for (task, tool), all_ in runs.items()}
        options.json.write_text(json.dumps(everything, indent=1))
    return 0


def check(out: Path, hf: Path, neox: Path, command: list[str]) -> None:
    """Compare both directions with the source, bit for bit: figures are reported only for correct results."""
    from tools.convert_hf.cli import main as convert_hf

    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for other in (neox, out):
        if convert_hf(["verify", str(hf), str(other), "--quiet"]):
            raise SystemExit(f"{other} is not equal to {hf}; no figures")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def print_table(runs: dict[tuple[str, str], list[Run]], size: str, tp: int) -> None:
    pick: dict[str, Callable[[Run], float]] = {
        "wall + sync, s": lambda r: r.seconds,
        "x cp": lambda r: r.ratio,
        "CPU, s": lambda r: r.cpu,
        "peak anonymous, GiB": lambda r: r.anonymous_mib / 1024,
        "read, GB": lambda r: r.read / 1e9,
        "written, GB": lambda r: r.written / 1e9,
        "output, GB": lambda r: r.output / 1e9,
    }
    print(f"\nsize {size}, TP {tp}: median (least-most)\n")
    print("| task | tool | " + " | ".join(pick) + " |")
    print("|---" * (len(pick) + 2) + "|")
    for (task, tool), all_ in runs.items():
        print(f"| {task} | {tool} | " + " | ".join(spread([f(r) for r in all_]) for f in pick.values()) + " |")


if __name__ == "__main__":
    sys.exit(main())
