"""Checks that a run's inputs exist and fit the model, and that there is space for its output.

Used by `deepy.py`, its `--dry-run`, `launch/render.py` and the preflight before anything is queued or started. Takes
about a second and does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron.checkpoint.choice import choose_start, own_options
from megatron.checkpoint.layer_set import set_problems
from megatron.checkpoint.owner import FolderOwner
from megatron.checkpoint.saved import saved_base, saved_checkpoint
from megatron.common.errors import ConfigError, UserError, first_problems, one_line
from megatron.evaluation.multiple_choice.items import read_items
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.registry import as_one_message

_ABSENT = ("no such file", "is not there", "is not a folder", "cannot be written")


def refuse_wrong_inputs(args: NeoXArgs, directory: Path | None = None, *, starts: bool = False) -> None:
    """Raise a ConfigError that names everything `input_problems` finds. The run's paths are relative to `directory`.

    A run that `starts` now needs its save folder for itself; a job that is only prepared may wait for the previous one.
    """
    _ = args.shape  # ConfigError if the vocabulary size is unknown: nothing can be compared with the model then
    with contextlib.chdir(directory or Path.cwd()):
        problems = input_problems(args)
        if starts and args.task == "train" and args.save is not None:
            problems += FolderOwner(Path(args.save)).problems()
    if not problems:
        return
    text = as_one_message(problems)
    if any(sign in text for sign in _ABSENT):
        text += "\n(if only the compute nodes see these paths, --paths-on-nodes leaves this check to them)"
    raise ConfigError(text)


def input_problems(args: NeoXArgs) -> list[str]:
    """What is missing, unreadable or does not fit, one sentence each; empty if all is well."""
    checks: list[Callable[[NeoXArgs], Iterator[str]]] = [_checkpoint, _tokenizer_and_data]
    if args.task == "train":
        checks += [_save_folder, _log_folders]
    if args.task == "generate":
        checks.append(_prompts)
    if args.task == "mcq":
        checks.append(_questions)
    if args.task == "embed":
        checks.append(_texts)
    if args.task == "eval":
        checks.append(_documents_and_tasks)
    problems: list[str] = []
    for check in checks:
        try:
            problems += check(args)
        except (UserError, OSError) as error:
            problems.append(one_line(error))
    return problems


def _checkpoint(args: NeoXArgs) -> Iterator[str]:
    own = False
    if args.task == "train":
        choice = choose_start(args)
        if choice is None:
            return
        root, iteration, own = choice.root, choice.iteration, choice.own_save
    elif args.load is None and args.from_scratch:
        return
    else:
        assert args.load is not None  # the rule weights_are_given
        root, iteration = Path(args.load), args.iteration
    found = saved_checkpoint(root, iteration, args, own_options(args) if own else None, own=own)
    if args.lora is not None and own:
        found = saved_base(found, args)
    folder, manifest = found.folder, found.manifest
    names = {path.name for path in folder.iterdir()} if manifest is None else set(manifest.files)
    # Loading splits weights for another TP size; the files are those of the TP size that wrote them.
    problems = set_problems(names, args.shape, found.layout.get("tp", args.model_parallel_size))
    if problems:
        yield f"{folder}: {first_problems(problems)}"


def _tokenizer_and_data(args: NeoXArgs) -> Iterator[str]:
    if args.reads_images:
        yield from _images(args)
        return
    from megatron.tokenizer import build_tokenizer

    tokenizer = None
    if args.vocab_file is not None:
        if Path(args.vocab_file).exists():  # a file, or a folder that holds tokenizer.json
            tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file)
            if args.vocab_size is not None and tokenizer.vocab_size > args.vocab_size:
                yield (
                    f"vocab_file {args.vocab_file} has {tokenizer.vocab_size} ids, the model only vocab_size "
                    f"{args.vocab_size}: give the tokenizer of the model"
                )
        else:
            yield f"vocab_file: {args.vocab_file} is not there; give the tokenizer's file, or its folder"
    if not _reads_sources(args):
        return
    from megatron.data.header import check_header, read_header
    from megatron.data.indexed import open_indexed

    for prefix, labels in _prefixes(args):
        try:
            file = open_indexed(prefix)
            header = read_header(prefix)
            if header is not None:
                check_header(prefix, header, tokenizer, args.vocab_size)
            if labels is not None and open_indexed(labels).num_tokens != file.num_tokens:
                yield f"labels {labels} do not go with {prefix}: every token needs one label"
            yield from _damaged_indices(Path(prefix))
        except (UserError, OSError) as error:
            yield one_line(error)


def _reads_sources(args: NeoXArgs) -> bool:
    """Whether the program reads the run's data; the inputs of the others are checked by functions of their own."""
    if args.task in ("generate", "mcq", "embed"):
        return False
    return not (args.task == "eval" and (args.eval_tasks or args.eval_documents))


def _images(args: NeoXArgs) -> Iterator[str]:
    from megatron.data.images import check_images

    for prefix, _ in _prefixes(args) if _reads_sources(args) else ():
        try:
            check_images(prefix, args)
        except (UserError, OSError) as error:
            yield one_line(error)


def _prefixes(args: NeoXArgs) -> list[tuple[str, str | None]]:
    """(data prefix, its labels) of every source that the run reads."""
    if args.data_path is not None:
        return [(args.data_path, None)]
    found: list[tuple[str, str | None]] = []
    for paths, labels in (
        (args.train_data_paths, args.train_label_data_paths),
        (args.valid_data_paths, args.valid_label_data_paths),
        (args.test_data_paths, args.test_label_data_paths),
    ):
        prefixes = [path if isinstance(path, str) else path.path for path in paths or []]
        beside: list[str | None] = [*labels] if labels else [None] * len(prefixes)
        found += zip(prefixes, beside, strict=True)
    return found


def _damaged_indices(prefix: Path) -> Iterator[str]:
    """Cached sample orders next to the data whose arrays are missing."""
    from megatron.data.index_cache import CACHE_FOLDER

    for folder in (prefix.parent / CACHE_FOLDER).glob(f"{prefix.name}_*"):
        if not folder.is_dir() or folder.suffix == ".tmp":
            continue
        try:
            names = json.loads((folder / "arrays.json").read_text())
            whole = all((folder / f"{name}.npy").stat().st_size for name in names)
        except (OSError, ValueError, TypeError):
            whole = False
        if not whole:
            yield f"{folder}: damaged index; remove this folder, it is built again"


def _save_folder(args: NeoXArgs) -> Iterator[str]:
    if args.save is None:
        return
    save = Path(args.save)
    yield from _unwritable("save", save)
    parent = _existing(save)
    # Imported here, because a run that saves nothing, and `--print-config`, do not need the planner.
    from megatron.planner.cost.checkpoint_size import checkpoint_size

    needed = checkpoint_size(args.trained_shape, args.model_parallel_size, args.precision).total
    free = shutil.disk_usage(parent).free
    if free < needed:
        yield (
            f"save: {parent} has {free / 1e9:,.3g} GB free, one checkpoint of this model needs "
            f"{needed / 1e9:,.3g} GB; free some, or give another folder"
        )


def _log_folders(args: NeoXArgs) -> Iterator[str]:
    for name, folder in (("log_dir", args.log_dir), ("tensorboard_dir", args.tensorboard_dir)):
        if folder is not None:
            yield from _unwritable(name, Path(folder))


def _prompts(args: NeoXArgs) -> Iterator[str]:
    if args.sample_input_file is not None and not Path(args.sample_input_file).is_file():
        yield f"sample_input_file: {args.sample_input_file} is not there"
    if args.reads_images:
        from megatron.data.images import check_images

        assert args.completion.path is not None  # the rule continued_images_are_given
        check_images(args.completion.path, args, with_length=False)


def _questions(args: NeoXArgs) -> Iterator[str]:
    assert args.mcq.items is not None  # the rule questions_are_given
    read_items(args.mcq.items, args.mcq)
    for name, path in (("shots_file", args.mcq.shots_file), ("compare_with", args.mcq.compare_with)):
        if path is not None and not Path(path).is_file():
            yield f"mcq.{name}: {path} is not there"
    yield from _unwritable("mcq.output", Path(args.mcq.output))


def _texts(args: NeoXArgs) -> Iterator[str]:
    assert args.embed.input is not None  # the rule texts_to_embed_are_given
    if args.reads_images:
        from megatron.data.images import check_images

        check_images(args.embed.input, args)
    elif not Path(args.embed.input).is_file():
        yield f"embed.input: {args.embed.input} is not there"
    output = Path(args.embed.output)
    if output.exists():
        yield f"embed.output: {output} already exists and is complete; remove it, or give another name"
    yield from _unwritable("embed.output", output.parent)


def _documents_and_tasks(args: NeoXArgs) -> Iterator[str]:
    for path in args.eval_documents or ():
        file = Path(path) if path.endswith(".jsonl") else Path(f"{path}.idx")
        if not file.is_file():
            yield f"eval_documents: {file} is not there"
    if args.eval_task_path is not None and not Path(args.eval_task_path).is_dir():
        yield f"eval_task_path: {args.eval_task_path} is not a folder"
    yield from _unwritable("eval_results_prefix", Path(f"{args.eval_results_prefix}x").parent)


def _unwritable(key: str, folder: Path) -> Iterator[str]:
    parent = _existing(folder)
    if not parent.is_dir():
        yield f"{key}: {parent} is not a folder"
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield f"{key}: {parent} cannot be written to"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
