"""Real text without a download: a domain corpus, general text, and a tokenizer trained on both.

    python examples/demo_data.py --output demo_out

Writes `text/{domain,general}_{train,valid}.jsonl` and `tokenizer/`. The domain is astronomy, from the docstrings of the
installed `astropy` package; general text is Python's own documentation topics (`pydoc_data.topics`). Each docstring or
topic is a document; training and validation share none. examples/astrollama, examples/merging.py and benchmarks/wsd.py
use this data; the demo's domain is facts (demo_facts.py).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import pydoc_data.topics
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.demo_tokenizer import CHAT_TEMPLATE, train_tokenizer  # noqa: E402

LEFT_OUT = ("tests", "extern")  # folders
MIN_LENGTH = 200  # characters
VALID_SHARE = {"domain": 0.03, "general": 0.1}


def docstrings(package: str) -> Iterator[str]:
    """Docstrings of an installed package's modules, classes and functions."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"demo_data.py: the package {package} is not installed (make venv installs it)")
    root = Path(next(iter(spec.submodule_search_locations)))
    return (text for _, text in named_docstrings(root, package))


def named_docstrings(
    root: Path, name: str, leave_out: Container[str] = ("tests", "extern")
) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of everything defined below a folder of sources, parsed but not imported."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in leave_out for part in parts):
            continue
        module = ".".join([name, *(part for part in parts if part != "__init__")]).lstrip(".")
        tree = ast.parse(path.read_bytes())
        owner = {child: node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    inner = [owner.get(node), getattr(node, "name", None)]  # type: ignore[call-overload]
                    yield ".".join([module, *(part for part in inner if part)]), text


def topics() -> Iterator[str]:
    """Python's documentation topics, in the order of their names."""
    for name in sorted(pydoc_data.topics.topics):
        yield inspect.cleandoc(pydoc_data.topics.topics[name])


def documents(texts: Iterator[str]) -> list[str]:
    """The texts that are long enough, without duplicates (many methods inherit their docstring)."""
    return list(dict.fromkeys(text.strip() + "\n" for text in texts if len(text) >= MIN_LENGTH))


def is_valid(text: str, share: float) -> bool:
    """Whether a document is for validation; decided by its content, so that the split is stable."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < share * 2**32


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    print(f"{path}: {len(texts)} documents, {path.stat().st_size / 1e6:.2f} MB")


def save_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> None:
    """Train and write `tokenizer.json`, with the `tokenizer_config.json` that `transformers` expects."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, vocab_size).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{folder}: {vocab_size} tokens, 256 of them special")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for text/ and tokenizer/")
    parser.add_argument("--model", type=Path, default=ROOT / "configs/tiny/model.yml", help="for the vocabulary size")
    options = parser.parse_args()
    (options.output / "text").mkdir(parents=True, exist_ok=True)
    training: list[str] = []
    for name, texts in (("domain", documents(docstrings("astropy"))), ("general", documents(topics()))):
        share = VALID_SHARE[name]
        train = [text for text in texts if not is_valid(text, share)]
        write_jsonl(options.output / f"text/{name}_train.jsonl", train)
        write_jsonl(options.output / f"text/{name}_valid.jsonl", [text for text in texts if is_valid(text, share)])
        training += train
    vocab_size = yaml.safe_load(options.model.read_text())["vocab_size"]
    save_tokenizer(training, vocab_size, options.output / "tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
