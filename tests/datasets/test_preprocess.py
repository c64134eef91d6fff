"""preprocess_data.py: its output, which neither the number of workers nor kills change, and rejected input."""

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron.data.header import check_header, file_crc32, read_header
from megatron.data.indexed import DataError, IndexedFile
from megatron.tokenizer import Tokenizer, build_tokenizer
from tests.support.data_commands import preprocess
from tests.support.text_files import BAD_LINES, file_digests, write_texts
from tests.support.vocabulary import real_texts
from tests.support.waiting import wait_until
from tools.datasets.encoding import records

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SMALL_BLOCK = 1 << 15  # bytes; the corpus of the tests is many such blocks


def texts_of(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(ids.tolist()) for ids in IndexedFile(prefix)]


def test_round_trip_of_real_text(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [*real_texts(), "<|end_of_text|> is text", "x"]
    source = write_texts(tmp_path / "in.jsonl", texts)
    assert preprocess(vocab_folder, tmp_path / "out", source, prepend_bos=True, append_eod=True) == 0
    prefix = tmp_path / "out_text_document"
    assert texts_of(prefix, hf_tokenizer) == [f"<|begin_of_text|>{text}<|end_of_text|>" for text in texts]
    for ids in IndexedFile(prefix):
        assert (ids == hf_tokenizer.bos).sum() == 1
        assert (ids == hf_tokenizer.eod).sum() == 1
    header = read_header(prefix)
    assert header is not None
    assert (header.documents, header.bos, header.eod) == (len(texts), hf_tokenizer.bos, hf_tokenizer.eod)
    assert header.tokens == IndexedFile(prefix).num_tokens
    assert header.crc32 == file_crc32(prefix.with_name(prefix.name + ".bin"))
    assert header.input_bytes == sum(len(text.encode()) for text in texts)


def test_the_flags_of_gpt_neox(
    vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_texts(tmp_path / "in.jsonl", ["a", "b c"])
    flags = {"jsonl_keys": "text", "num_docs": 2, "append_eod": True, "ftfy": True, "dataset_impl": "mmap"}
    assert preprocess(vocab_folder, tmp_path / "out", source, log_interval=1, merge_file="merges.txt", **flags) == 0
    assert "--merge-file merges.txt is not read" in capsys.readouterr().err
    expected = ["a<|end_of_text|>", "b c<|end_of_text|>"]
    assert texts_of(tmp_path / "out_text_document", hf_tokenizer) == expected


def test_without_flags_nothing_is_added(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert preprocess(vocab_folder, tmp_path / "out", write_texts(tmp_path / "in.jsonl", ["a", "b c"])) == 0
    assert texts_of(tmp_path / "out_text_document", hf_tokenizer) == ["a", "b c"]


def test_any_number_of_workers_gives_the_same_bytes(
    vocab_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK_BYTES", SMALL_BLOCK)
    source = write_texts(tmp_path / "in.jsonl", real_texts())
    assert source.stat().st_size > 12 * SMALL_BLOCK
    for workers in (1, 2, 4):
        (tmp_path / f"w{workers}").mkdir()
        assert preprocess(vocab_folder, tmp_path / f"w{workers}" / "out", source, workers=workers, append_eod=True) == 0
    assert len(file_digests(tmp_path / "w1")) == 3
    assert file_digests(tmp_path / "w1") == file_digests(tmp_path / "w2") == file_digests(tmp_path / "w4")


def test_a_killed_run_goes_on(vocab_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BLOCK_BYTES", SMALL_BLOCK)
    source = write_texts(tmp_path / "in.jsonl", real_texts())
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert preprocess(vocab_folder, tmp_path / "a" / "out", source) == 0
    code = (
        "import sys, time; import tools.datasets.encoding.pipeline as p; p.JOURNAL_SECONDS = 0\n"
        f"import tools.datasets.encoding.records as records; records.BLOCK_BYTES = {SMALL_BLOCK}\n"
        "save = p.EncodingJournal.save\n"
        "def slow(self, path): save(self, path); time.sleep(30 if self.blocks == 3 else 0)\n"
        "p.EncodingJournal.save = slow\n"
        "from tools.datasets.preprocess_data import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--input", str(source), "--output-prefix", str(tmp_path / "b" / "out"), "--workers", "2"]
    arguments += ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(vocab_folder)]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT)
    journal = tmp_path / "b" / "out.partial.json"
    wait_until(lambda: journal.exists() and json.loads(journal.read_text())["blocks"] == 3, "three blocks", 60, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    partial = tmp_path / "b" / "out_text_document.partial.bin"
    kept = partial.stat().st_size
    assert kept > 0
    assert preprocess(vocab_folder, tmp_path / "b" / "out", source) == 0
    assert file_digests(tmp_path / "a") == file_digests(tmp_path / "b")


def test_a_journal_of_another_job_is_not_used(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    journal = {"identity": "another", "blocks": 1, "states": [{"bytes": 10, "documents": 1}]}
    (tmp_path / "out.partial.json").write_text(json.dumps(journal))
    assert preprocess(vocab_folder, tmp_path / "out", write_texts(tmp_path / "in.jsonl", ["a", "b c"])) == 0
    assert texts_of(tmp_path / "out_text_document", hf_tokenizer) == ["a", "b c"]


def test_every_format_and_way_to_name_it(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "deeper"
    folder.mkdir(parents=True)
    line = {name: json.dumps({"text": name}).encode() + b"\n" for name in ("gz", "zst1", "zst2", "plain")}
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(line["gz"]))
    frames = [zstandard.compress(line["zst1"]), zstandard.compress(line["zst2"])]
    (folder / "b.jsonl.zst").write_bytes(b"".join(frames))  # several frames, as parallel compressors write
    (folder / "c.txt").write_text("whole\ntext\n")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["p1", "p2"]}), folder / "d.parquet")
    (folder / "e.jsonl").write_bytes(line["plain"])
    (folder / "ignored.md").write_text("x")
    expected = ["gz", "zst1", "zst2", "whole\ntext\n", "p1", "p2", "plain"]
    assert preprocess(vocab_folder, tmp_path / "folder", tmp_path / "in") == 0
    assert texts_of(tmp_path / "folder_text_document", hf_tokenizer) == expected
    assert preprocess(vocab_folder, tmp_path / "glob", f"{folder}/*.jsonl*,{folder}/c.txt") == 0
    assert texts_of(tmp_path / "glob_text_document", hf_tokenizer) == ["gz", "zst1", "zst2", "plain", "whole\ntext\n"]


def test_each_key_gets_its_own_text(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"a": "one", "b": "two"}\n{"a": "three", "b": ""}\n')
    assert preprocess(vocab_folder, tmp_path / "out", tmp_path / "in.jsonl", jsonl_keys=["a", "b"]) == 0
    assert texts_of(tmp_path / "out_a_document", hf_tokenizer) == ["one", "three"]
    assert texts_of(tmp_path / "out_b_document", hf_tokenizer) == ["two"]


def test_ftfy(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    broken = "naïve façade".encode().decode("latin-1")
    assert preprocess(vocab_folder, tmp_path / "out", write_texts(tmp_path / "in.jsonl", [broken]), ftfy=True) == 0
    assert texts_of(tmp_path / "out_text_document", hf_tokenizer) == ["naïve façade"]


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_bad_records(
    line: bytes, vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last \\u0000\\ud800"}\n')
    assert preprocess(vocab_folder, tmp_path / "out", tmp_path / "in.jsonl") == 2
    assert BAD_LINES[line] in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    assert preprocess(vocab_folder, tmp_path / "out", tmp_path / "in.jsonl", on_bad_record="skip") == 0
    assert BAD_LINES[line] in capsys.readouterr().err
    assert texts_of(tmp_path / "out_text_document", hf_tokenizer) == ["first", "last \x00\ufffd"]
    header = read_header(tmp_path / "out_text_document")
    assert header is not None
    assert (header.skipped, header.empty) == (1, 0)


def test_a_failed_run_keeps_the_previous_output(vocab_folder: Path, tmp_path: Path) -> None:
    assert preprocess(vocab_folder, tmp_path / "out", write_texts(tmp_path / "a.jsonl", ["a"])) == 0
    before = file_digests(tmp_path)
    (tmp_path / "b.jsonl").write_text("{")
    assert preprocess(vocab_folder, tmp_path / "out", tmp_path / "b.jsonl") == 2
    (tmp_path / "b.jsonl").unlink()
    assert file_digests(tmp_path) == before


def test_long_lines_and_nul_bytes(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = "galaxy cluster \x00 " * 20_000
    lines = [{"text": "a"}, {"text": long, "other": "x" * 10_000_000}, {"text": "b"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert preprocess(vocab_folder, tmp_path / "out", tmp_path / "in.jsonl") == 0
    assert texts_of(tmp_path / "out_text_document", hf_tokenizer) == ["a", long, "b"]


def test_the_header_guards_the_tokenizer(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert preprocess(vocab_folder, tmp_path / "out", write_texts(tmp_path / "a.jsonl", ["abc"])) == 0
    prefix = str(tmp_path / "out_text_document")
    header = read_header(prefix)
    assert header is not None
    check_header(prefix, header, hf_tokenizer, 1024)
    with pytest.raises(DataError, match="tokenized with another tokenizer"):
        check_header(prefix, header, build_tokenizer("TiktokenTokenizer", vocab_folder), 1024)
    with pytest.raises(DataError, match="token id"):
        check_header(prefix, header, None, header.max_token)
    with pytest.raises(DataError, match="belongs to other data"):
        check_header(prefix, header.model_copy(update={"tokens": header.tokens + 1}), hf_tokenizer, None)
    (tmp_path / "out_text_document.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="not a data header"):
        read_header(prefix)


def test_help_is_quick_and_a_tokenizer_without_bos_refuses(
    vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import sys; import tools.datasets.preprocess_data; print([m for m in sys.modules if m in ('torch','numpy')])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    content = json.loads((vocab_folder / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] == "<|end_of_text|>"]
    content["added_tokens"][0]["id"] = 768
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    source = write_texts(tmp_path / "in.jsonl", ["a"])
    assert preprocess(tmp_path / "tokenizer.json", tmp_path / "out", source, prepend_bos=True) == 2
    assert "no begin-of-text token" in capsys.readouterr().err
