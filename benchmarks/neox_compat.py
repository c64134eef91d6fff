"""Reading every configuration of a GPT-NeoX checkout with GPT-NeoX and with this project.

    python benchmarks/neox_compat.py --upstream DIR [--python PYTHON] [FILE ...] [--tests] [--details] [--json OUT]

DIR is a checkout of EleutherAI/gpt-neox, PYTHON the interpreter of an environment that can import it (DeepSpeed 0.16.5,
transformers 4.38, numpy 1.26, setuptools < 81); without it, the columns of GPT-NeoX are empty. FILE are additional
configuration files that are not part of the checkout.

A file that describes only a part of a run is completed, without changing it, with GPT-NeoX's own files for the missing
parts: `llama/7B.yml` for the model, `llama/train_config.yml` for the training, `local_setup.yml` for the data; paths
that are still missing are given on the command line, such as `--load checkpoints`. Printed for each file: the verdicts
of GPT-NeoX and of this project, the number of rounds needed by a user who follows every message (writes the value that
it gives, or removes the key that it names), the lines of messages, and every derived value that differs. The exit code
is 1 if a dense Llama that GPT-NeoX accepts is refused, or if another model is not refused as such in the first line of
one round.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.family import other_model
from megatron.neox_arguments.load import merge_files, parse_value, read_yaml
from megatron.neox_arguments.old_words import OLD_WORDS
from megatron.neox_arguments.unsupported import UNSUPPORTED, WITHOUT_EFFECT

FOLDERS = ("configs", "post-training/configs", "tests/config", "tests/test_configs")
MODEL, TRAINING, MACHINE = "configs/llama/7B.yml", "configs/llama/train_config.yml", "configs/local_setup.yml"
PATHS = {"data_path": "data/text_document", "vocab_file": "data/tokenizer.json", "load": "checkpoints"}
MOST_ROUNDS = 6


@dataclass
class Verdict:
    """The verdicts of both programs on a file and the files that complete it."""

    file: str
    with_files: list[str]
    overrides: dict[str, Any]  # additional keys: paths, and for GPT-NeoX the number of ranks
    kind: str  # "dense Llama", "other", "old words" or "fails upstream"
    upstream: str = "not run"
    accepted: bool = False
    rounds: int = 0
    lines: list[str] = field(default_factory=list)
    differences: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def completed(file: Path, root: Path) -> list[Path]:
    """The file and those for the missing parts of a run; a part that would repeat a key is omitted."""
    files, keys = [file], set(read_yaml(file)[0])
    wanted = [
        (MODEL, bool(keys & {"num_layers", "hidden_size"})),
        (TRAINING, bool(keys & {"optimizer", "train_iters"})),
        (MACHINE, bool(keys & {"data_path", "train_data_paths", "pos_train_data_paths"})),
    ]
    for name, present in wanted:
        part = root / name
        added = set(read_yaml(part)[0])
        if not present and part.resolve() != file.resolve() and not added & keys:
            files.append(part)
            keys |= added
    return files


def ranks_of(keys: dict[str, Any]) -> int:
    """The smallest number of ranks required by the sizes and the batch."""
    model = max(1, keys.get("pipe_parallel_size") or 0) * max(1, keys.get("model_parallel_size") or 1)
    batch, micro = keys.get("train_batch_size"), keys.get("train_micro_batch_size_per_gpu")
    steps = keys.get("gradient_accumulation_steps") or 1
    return model * (max(1, batch // (micro * steps)) if batch and micro else 1)


def obeyed(keys: dict[str, Any], lines: list[str]) -> dict[str, Any]:
    """The keys after following each line: writing the value it gives, else removing the key it names."""
    result = dict(keys)
    for line in lines:
        advice = line.partition("; ")[2]
        written = dict(re.findall(r"(?:write|and) (\w+): ([\w.+-]+)", advice))
        named = re.match(r"(\w+)", line)
        if named and named[1] in result and named[1] not in written:
            del result[named[1]]
        result |= {name: parse_value(value) for name, value in written.items()}
    return result


def judge(file: Path, root: Path) -> Verdict:
    """This project's verdict."""
    files = completed(file, root)
    try:
        keys, _ = merge_files(files)
    except ConfigError as error:
        return Verdict(file.name, [], {}, "fails upstream", accepted=False, rounds=1, lines=str(error).splitlines())
    name = str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
    kind = "other" if other_model(keys) else "old words" if set(keys) & set(OLD_WORDS) else "dense Llama"
    paths = {path: value for path, value in PATHS.items() if not keys.get(path)}
    if any(key.endswith("_data_paths") for key in keys):
        paths.pop("data_path", None)
    verdict = Verdict(name, [str(part) for part in files], paths | {"global_num_gpus": ranks_of(keys)}, kind)
    known = keys | paths
    while verdict.rounds < MOST_ROUNDS:
        try:
            args = NeoXArgs.from_dict(known, ranks_of(known))
        except ConfigError as error:
            text = str(error).splitlines()
            verdict.rounds += 1
            verdict.lines = verdict.lines or [
                line.removeprefix("  - ") for line in text if "things are wrong:" not in line
            ]
            after = obeyed(known, [line.removeprefix("  - ") for line in text])
            if verdict.kind == "other" or after == known:
                break
            known = after
        else:
            verdict.accepted = verdict.rounds == 0
            if verdict.accepted:
                verdict.differences = {"": (None, ours(args))}
            break
    return verdict


def ours(args: NeoXArgs) -> dict[str, Any]:
    """The values that exist in GPT-NeoX as well, under its names."""
    return args.model_dump() | {
        "lr": args.lr,
        "betas": args.optimizer.params.betas,
        "mlp_width": args.intermediate_size,
        "precision": args.precision,
    }


def ask_upstream(verdicts: list[Verdict], root: Path, python: str) -> None:
    """Fill in GPT-NeoX's verdicts, and the differing values of accepted files."""
    requests = [{"files": verdict.with_files, "overrides": verdict.overrides} for verdict in verdicts]
    script = Path(__file__).with_name("neox_upstream.py")
    with tempfile.TemporaryDirectory() as folder:  # GPT-NeoX opens its logs as soon as it reads a configuration
        done = subprocess.run(
            [python, str(script)],
            input=json.dumps(requests),
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
    if done.returncode:
        raise SystemExit(f"{python} cannot run GPT-NeoX: {done.stderr.strip().splitlines()[-1:]}")
    for verdict, answer in zip(verdicts, json.loads(done.stdout.strip().splitlines()[-1]), strict=True):
        verdict.upstream = answer.get("error", "parses")
        mine = verdict.differences.pop("", (None, {}))[1]
        theirs = answer.get("values", {})
        for name in sorted(set(mine) & set(theirs)):
            if not _equal(mine[name], theirs[name]):
                verdict.differences[name] = (theirs[name], mine[name])


def _equal(mine: Any, theirs: Any) -> bool:
    if mine in (None, []) and theirs in (None, []):
        return True
    return bool(mine == theirs)


def table(verdicts: list[Verdict], details: bool) -> str:
    rows = [f"{'file':58} {'kind':12} {'upstream':9} {'ours':9} rounds lines differences"]
    for verdict in verdicts:
        upstream = verdict.upstream if verdict.upstream in ("parses", "not run") else "fails"
        differences = ", ".join(
            f"{name} {theirs} -> {mine}" for name, (theirs, mine) in verdict.differences.items() if name
        )
        answer = "accepted" if verdict.accepted else "refused"
        rows.append(
            f"{verdict.file:58} {verdict.kind:12} {upstream:9} {answer:9} {verdict.rounds:6} {len(verdict.lines):5} "
            f"{differences}"
        )
        if details:
            rows += [f"    | {line}" for line in verdict.lines]
            rows += [f"    < {verdict.upstream}"] if upstream == "fails" else []
    return "\n".join(rows)


def wrong(verdict: Verdict) -> bool:
    """Whether this project's verdict is wrong."""
    if verdict.kind == "dense Llama":
        return not verdict.accepted and verdict.upstream in ("parses", "not run")
    if verdict.kind == "other":
        first = verdict.lines[0] if verdict.lines else ""
        return verdict.accepted or verdict.rounds != 1 or not re.match(r"this is (not a dense Llama|preference)", first)
    return False


def run_its_tests(root: Path) -> int:
    """Load the files of `tests/neox_args/test_neoxargs_load.py`, and every Llama and Mistral; returns failures.

    As in that test, every key of the files must be found in the result. A GPT passes if it is refused as such in the
    first line of one round.
    """
    source = ast.parse((root / "tests/neox_args/test_neoxargs_load.py").read_text())
    calls = [
        [root / "configs" / name for name in ast.literal_eval(node.args[0])]
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_neox_args_load_test"
    ]
    llamas = sorted([*(root / "configs").glob("llama*/*B.yml"), root / "configs/mistral/7B.yml"])
    calls += [[model, root / TRAINING, root / MACHINE] for model in llamas]
    failures = 0
    for files in calls:
        keys, _ = merge_files(files)
        window = {"sliding_window_width": None} if "mistral" in str(files[0]) else {}
        other = other_model(keys | window)
        try:
            args = NeoXArgs.from_dict(keys | window | {"global_num_gpus": ranks_of(keys)})
            lost = [name for name, value in keys.items() if not _is_kept(name, value, args) and name not in window]
            passed, said = other is None and not lost, f"accepted{', lost: ' + ', '.join(lost) if lost else ''}"
        except ConfigError as error:
            lines = [line.removeprefix("  - ") for line in str(error).splitlines() if "things are wrong" not in line]
            passed = "num_layers" not in keys or (other is not None and lines[0] == other.sentence)
            said = f"refused in one round: {lines[0][:70]}"
        failures += not passed
        print(f"{'pass' if passed else 'FAIL'} {' '.join(file.stem for file in files):44} {said}")
    print(f"{len(calls) - failures} of {len(calls)} loads of its tests pass")
    return failures


def _is_kept(name: str, value: Any, args: NeoXArgs) -> bool:
    """Whether a key of a file is in the configuration, is mentioned in a note, or has no effect."""
    if name in UNSUPPORTED or name in WITHOUT_EFFECT:
        return True
    held = getattr(args, name)
    if isinstance(value, dict):
        return all(held.model_dump().get(key, item) == item for key, item in value.items() if key != "params")
    changed = {"intermediate_size", "mlp_multiple_of"}  # the final width, which the table compares
    return held == value or name in changed or (name == "pipe_parallel_size" and value == 0)


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", type=Path, help="additional configuration files")
    p.add_argument("--upstream", type=Path, required=True, help="a checkout of GPT-NeoX")
    p.add_argument("--python", help="interpreter that can import it")
    p.add_argument("--tests", action="store_true", help="also load the configurations of its tests")
    p.add_argument("--details", action="store_true", help="print every line of every refusal")
    p.add_argument("--json", type=Path, help="write all results to this file")
    options = p.parse_args(arguments)
    root = options.upstream.resolve()
    own = [
        file for folder in FOLDERS for file in sorted((root / folder).rglob("*")) if file.suffix in (".yml", ".json")
    ]
    verdicts = [judge(file, root) for file in [*own, *options.files]]
    if options.python:
        ask_upstream(verdicts, root, options.python)
    else:
        for verdict in verdicts:
            verdict.differences = {}
    print(table(verdicts, options.details))
    counts = {kind: [v for v in verdicts if v.kind == kind] for kind in ("dense Llama", "other", "old words")}
    llamas, others = counts["dense Llama"], counts["other"]
    print(
        f"\n{len(verdicts)} files. GPT-NeoX parses {sum(v.upstream == 'parses' for v in verdicts)}"
        f"{'' if options.python else ' (not run: no --python)'}. Dense Llama: {sum(v.accepted for v in llamas)} of "
        f"{len(llamas)} accepted untouched. Other models and trainings: "
        f"{sum(not wrong(v) for v in others)} of {len(others)} told so first, in one round. Old words: "
        f"{len(counts['old words'])}, {sum(v.rounds == 1 for v in counts['old words'])} answered in one round."
    )
    failed = run_its_tests(root) if options.tests else 0
    if options.json:
        options.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1, default=str) + "\n")
    return int(failed > 0 or any(map(wrong, verdicts)))


if __name__ == "__main__":
    sys.exit(main())
