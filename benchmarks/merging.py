"""Merging compared with reading all parents and copying one, and with mergekit, in one run on one disk.

    python benchmarks/merging.py --work DIR [--size 1b] [--rounds 3] [--threads 2] [--mergekit PYTHON]

Creates a random Llama-3.1 of the chosen size and four models close to it, then merges them by DARE-TIES at density 0.5.
Each tool runs in its own process, with the parents' pages dropped from the cache first, and is timed to the last byte
on disk. The floor is a `cat` of all models and a `cp` of one. Memory is the peak of anonymous pages over the process
tree. PYTHON is an interpreter with mergekit installed; without it, mergekit is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.conversion import CHUNK, SIZES, Run, make_fixture, run_tool, spread  # noqa: E402

WEIGHTS = (0.7, 0.15, 0.075, 0.075)
PARAMETERS_70B = 70_553_706_496
MERGEKIT = """
import sys, torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
torch.set_num_threads(int(sys.argv[3]))
options = MergeOptions(quiet=True, copy_tokenizer=False, random_seed=7, lazy_unpickle=True)
run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1]))), sys.argv[2], options)
"""


def make_models(root: Path, size: str) -> None:
    """`root/base` and four models that differ from it by about 0.001, chunk by chunk."""
    import torch

    from tools.convert_hf.formats.safetensors_file import read_safetensors_header

    make_fixture(root / "base", size)
    for number in range(1, len(WEIGHTS) + 1):
        folder = root / f"m{number}"
        folder.mkdir()
        noise = torch.randn(CHUNK, generator=torch.Generator().manual_seed(number)) * 1e-3
        for path in sorted((root / "base").iterdir()):
            if path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
                continue
            start = min(t.offset for t in read_safetensors_header(path).values())
            with open(path, "rb") as source, open(folder / path.name, "wb") as target:
                target.write(source.read(start))
                while data := source.read(2 * CHUNK):
                    values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16)
                    moved = (values.float() + noise[: values.numel()]).bfloat16()
                    target.write(moved.view(torch.uint8).numpy().tobytes())
                os.fsync(target.fileno())


def write_recipe(path: Path, root: Path) -> None:
    models = [
        {"model": str(root / f"m{i + 1}"), "parameters": {"weight": weight, "density": 0.5}}
        for i, weight in enumerate(WEIGHTS)
    ]
    recipe = {"merge_method": "dare_ties", "base_model": str(root / "base"), "models": models, "dtype": "bfloat16"}
    path.write_text(json.dumps(recipe))  # JSON is YAML


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and the outputs")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="threads of tools/merge")
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter with mergekit installed")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    options = parser.parse_args()
    root, out, recipe = options.work / f"parents_{options.size}", options.work / "out", options.work / "merge.yml"
    if not (root / "complete").exists():
        shutil.rmtree(root, ignore_errors=True)
        make_models(root, options.size)
        (root / "complete").touch()
    write_recipe(recipe, root)
    merge = [sys.executable, str(ROOT / "tools" / "merge"), str(recipe), "--threads", str(options.threads), "--quiet"]
    models, base, target = (shlex.quote(str(path)) for path in (root, root / "base", out))
    tools = {
        "floor": ["sh", "-c", f"cat {models}/*/* > /dev/null && cp -r {base} {target}"],
        "tools/merge": [*merge, "--output", str(out)],
    }
    if options.mergekit:
        tools["mergekit"] = [options.mergekit, "-c", MERGEKIT, str(recipe), str(out), "1"]
    runs: dict[str, list[Run]] = {tool: [] for tool in tools}
    for number in range(options.rounds):
        done = {}
        for tool in random.Random(number).sample(list(tools), len(tools)):
            done[tool] = run_tool(tool, tools[tool], root, out)
            if tool == "tools/merge" and number == 0:
                # Figures are reported only for correct results.
                subprocess.run([*merge, "--verify", str(out)], check=True, stdout=subprocess.DEVNULL)
        for tool, run in done.items():
            run.ratio = run.seconds / done["floor"].seconds
            runs[tool].append(run)
            print(f"round {number + 1}: {tool}: {run.seconds:.1f} s, {run.ratio:.2f} x floor", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    report(runs, root)
    if options.json:
        options.json.write_text(json.dumps({t: [asdict(r) for r in rs] for t, rs in runs.items()}, indent=1))
    return 0


def report(runs: dict[str, list[Run]], root: Path) -> None:
    elements = sum(p.stat().st_size for p in (root / "base").glob("*.safetensors")) // 2
    print(f"\n{elements / 1e9:.2f} billion parameters, base and {len(WEIGHTS)} models, bf16, DARE-TIES at density 0.5")
    print("| tool | wall + sync, s | x floor | CPU, s | peak anonymous, GiB |\n|---|---|---|---|---|")
    for tool, all_ in runs.items():
        cells = [
            spread([r.seconds for r in all_]),
            spread([r.ratio for r in all_]) if tool != "floor" else "1",
            spread([r.cpu for r in all_]),
            f"{max(r.anonymous_mib for r in all_) / 1024:.2f}",
        ]
        print(f"| {tool} | " + " | ".join(cells) + " |")
    for number, (ours, floor) in enumerate(zip(runs["tools/merge"], runs["floor"], strict=True), 1):
        bound = max(1.3 * floor.seconds, ours.cpu / 2)
        verdict = "within" if ours.seconds <= bound else "above"
        print(
            f"round {number}: wall {ours.seconds:.1f} s, {verdict} max(1.3 x floor, CPU / 2) = "
            f"max({1.3 * floor.seconds:.1f}, {ours.cpu / 2:.1f}) = {bound:.1f} s"
        )
    cpu = min(r.cpu for r in runs["tools/merge"]) / elements
    moved = 2 * PARAMETERS_70B * (len(WEIGHTS) + 2)
    print(
        f"70B by arithmetic: {cpu * 1e9:.0f} ns of CPU an element are {cpu * PARAMETERS_70B / 60:.0f} core-minutes; "
        f"{moved / 1e9:.0f} GB move, {moved / 1e9 / 60:.0f} minutes at 1 GB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
