"""to-hf after supervised fine-tuning: end tokens and chat template come from the data, and this is reported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.manifest import read_manifest, write_manifest
from megatron.data.header import fingerprint
from megatron.data.indexed import IndexedFile
from megatron.tokenizer import Tokenizer
from tests.support.conversations import conversations
from tests.support.data_commands import preprocess_chats
from tests.support.hf_folders import Model, convert, write_hf
from tests.support.text_files import write_records
from tools.convert_hf.cli import main

pytestmark = pytest.mark.unit

EOT, EOM = "<|eot_id|>", "<|eom_id|>"
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def checkpoint(vocab_folder: Path, tmp_path: Path) -> Path:
    """A base model as GPT-NeoX layer files, with a real tokenizer and no chat format."""
    write_hf(tmp_path / "hf", Model(vocab=1024))
    (tmp_path / "hf/chat_template.jinja").unlink()
    (tmp_path / "hf/tokenizer.json").write_bytes((vocab_folder / "tokenizer.json").read_bytes())
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "hf/generation_config.json").write_text('{"eos_token_id": 769, "temperature": 0.6}')
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 1)
    return tmp_path / "neox"


def as_trained_on(checkpoint: Path, **data: str) -> None:
    """Change the checkpoint's manifest to that of a run trained on these prefixes."""
    folder = checkpoint / "global_step0"
    manifest = read_manifest(folder)
    provenance = manifest.provenance | {
        "written_by": "training",
        "config": manifest.provenance["config"] | {"train_data_paths": [*data.values()], "valid_data_paths": ["other"]},
        "data": {**{prefix: fingerprint(prefix) for prefix in data.values()}, "other": {"chat": {"template": "no"}}},
    }
    write_manifest(folder, dataclasses.replace(manifest, provenance=provenance))


def export(checkpoint: Path, capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> tuple[Path, str]:
    out = checkpoint.parent / f"out{len(list(checkpoint.parent.glob('out*')))}"
    capsys.readouterr()
    assert main(["to-hf", "--input", str(checkpoint), "--output", str(out), "--quiet", *more]) == code
    captured = capsys.readouterr()
    return out, captured.out + captured.err


@pytest.mark.parametrize("template", [None, CHATML], ids=["llama3", "jinja"])
def test_export_follows_the_data(
    template: str | None,
    checkpoint: Path,
    vocab_folder: Path,
    hf_tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import transformers

    records = conversations(4, "stars")
    source = write_records(tmp_path / "a.jsonl", records)
    options: dict[str, Any] = {}
    if template is not None:
        (tmp_path / "given").mkdir()
        (tmp_path / "given/t.jinja").write_text(template)
        special = {"bos_token": "<|begin_of_text|>", "eos_token": EOT}
        (tmp_path / "given/tokenizer_config.json").write_text(json.dumps(special))
        options["chat_template"] = str(tmp_path / "given/t.jinja")
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={source}", **options) == 0
    as_trained_on(checkpoint, a=str(tmp_path / "sft_a_document"))
    out, said = export(checkpoint, capsys)
    ends = [hf_tokenizer.token_id(name) for name in ((EOT, EOM) if template is None else (EOT,))]
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [769, *ends]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [769, *ends]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == EOT
    written = IndexedFile(tmp_path / "sft_a_document")
    for number, record in enumerate(records):
        text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        assert text == hf_tokenizer.decode(written.document(number).tolist())
    for line in (
        "note: generation also ends at",
        "note: tokenizer_config.json: eos_token is <|eot_id|>",
        "is the template of",
    ):
        assert line in said
    kept, said = export(checkpoint, capsys, "--base-chat")
    assert "note: generation" not in said
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        assert (kept / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    # a resharded checkpoint still knows the data
    convert("reshard", "--input", checkpoint, "--output", tmp_path / "two", "--tp", 2)
    again, _ = export(tmp_path / "two", capsys)
    assert (again / "chat_template.jinja").read_bytes() == (out / "chat_template.jinja").read_bytes()


def test_a_model_that_was_not_trained_on_conversations_is_left_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_trained_on(checkpoint)
    out, said = export(checkpoint, capsys)
    assert "note: generation" not in said
    assert not (out / "chat_template.jinja").exists()
    assert (out / "generation_config.json").read_bytes() == (tmp_path / "hf/generation_config.json").read_bytes()


def test_sources_of_different_templates_are_refused(
    checkpoint: Path, vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    a = write_records(tmp_path / "a.jsonl", conversations(2, "stars"))
    assert preprocess_chats(vocab_folder, tmp_path / "one", f"a={a}") == 0
    assert preprocess_chats(vocab_folder, tmp_path / "two", f"b={a}", chat_template=str(tmp_path / "t.jinja")) == 0
    as_trained_on(checkpoint, a=str(tmp_path / "one_a_document"), b=str(tmp_path / "two_b_document"))
    _, said = export(checkpoint, capsys, code=2)
    assert "conversations with different chat templates" in said
    export(checkpoint, capsys, "--base-chat")
