"""The boundary for user errors: for any content of a file, a command gives one message and the right exit code."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.render import main as render_main
from megatron.checkpoint import verify
from megatron.checkpoint.discovery import find_checkpoint
from megatron.checkpoint.layer_files import verify_before_load
from megatron.common.boundary import DEFECT, DONE, INTERRUPTED, USER_ERROR, guarded
from megatron.common.errors import UserError
from megatron.launcher.command_line import main as deepy_main
from megatron.neox_arguments import ConfigError
from tests.support.checkpoints import SHAPE, write_weights
from tests.support.configurations import keys
from tests.support.mutations import mutated_bytes, mutated_text

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def answer(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *words: str) -> tuple[int, str]:
    """Exit code and standard error, without notes."""
    try:
        code = main(list(words))
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    return code, "\n".join(said)


def test_mutated_yaml_is_read_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance, refused = random.Random(12), 0
    texts = [yaml.safe_dump(keys(), sort_keys=False), yaml.safe_dump(keys(save="x", checkpoint_factor=2))]
    texts += [(ROOT / "configs" / "tiny" / name).read_text() for name in ("model.yml", "run.yml", "local.yml")]
    path = tmp_path / "run.yml"
    for number in range(700):
        text = mutated_text(chance.choice(texts), chance)
        path.write_bytes(text.encode("utf-8", "surrogatepass") if number % 10 else mutated_bytes(text.encode(), chance))
        code, said = answer(capsys, deepy_main, str(ROOT / "train.py"), str(path), "--print-config")
        assert code in (DONE, USER_ERROR), f"{said}\n---\n{path.read_bytes()!r}"
        assert said.startswith("deepy.py: ") if code else said == "", path.read_bytes()
        refused += code == USER_ERROR
    assert refused > 400, "the mutations hardly damage anything"


def test_mutated_options_are_read_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(5)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(keys()))
    for _ in range(150):
        words = [mutated_text(word, chance) for word in ("--train_iters", "10", "--optimizer.params.lr", "1e-5")]
        code, said = answer(
            capsys, deepy_main, str(ROOT / "train.py"), str(tmp_path / "run.yml"), *words, "--print-config"
        )
        assert code in (DONE, USER_ERROR), (said, words)


def test_mutated_manifests_are_read_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(3)
    folder = write_weights(tmp_path, tp=1)
    right = (folder / "manifest.json").read_text()
    codes = set()
    for _ in range(250):
        (folder / "manifest.json").write_text(mutated_text(right, chance), errors="surrogatepass")
        code, said = answer(capsys, verify.main, str(tmp_path), "--workers", "1")
        assert code in (0, 1, 2), said
        assert "Traceback" not in said
        codes.add(code)
    assert 2 in codes


def test_mutated_layer_files_are_read_or_refused(tmp_path: Path) -> None:
    """Headers only, as before a load: any exception other than the list of problems fails the test."""
    chance, refused = random.Random(4), 0
    folder = write_weights(tmp_path, tp=1, manifest=False)
    path = sorted(folder.glob("layer_*"))[1]
    right = path.read_bytes()
    for _ in range(250):
        path.write_bytes(mutated_bytes(right, chance))
        refused += bool(verify_before_load(folder, SHAPE, 1))
    assert refused > 50


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (ConfigError("the sky is cloudy"), USER_ERROR, "tool: the sky is cloudy"),
        (
            FileNotFoundError(2, "No such file or directory", "x.yml"),
            USER_ERROR,
            "tool: x.yml: No such file or directory",
        ),
        (IsADirectoryError(21, "Is a directory", "y"), USER_ERROR, "tool: y: Is a directory"),
        (KeyboardInterrupt(), INTERRUPTED, "tool: interrupted"),
        (ZeroDivisionError("by zero"), DEFECT, "tool: a defect of this program, not of what you gave it: "),
    ],
)
def test_every_kind_of_error(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, last: str) -> None:
    def fails() -> int:
        raise error

    assert guarded("tool", fails) == code
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(last)
    assert ("Traceback" in said) is (code == DEFECT)


WRONG: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("a folder", {}, ["{folder}"], "is a folder; give the YAML files in it"),
    ("no such file", {}, ["{folder}/none.yml"], "none.yml: cannot be read (No such file or directory)"),
    ("Latin-1", {}, ["{folder}/latin.yml"], "latin.yml: not UTF-8 text (byte"),
    ("a device", {}, ["{run}", "--device", "gpu"], "given 'gpu', but it should be 'cuda' or 'cpu'"),
    ("betas", {}, ["{run}", "--optimizer.params.betas", "[0.9, 1.5]"], "betas.1: given 1.5, but it should be less"),
    ("RANK", {"RANK": "abc", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["{run}"], "RANK is 'abc', expected a number"),
    ("RANK alone", {"RANK": "0"}, ["{run}"], "RANK set without WORLD_SIZE, LOCAL_RANK: set all three or none"),
    ("a step", {"SLURM_STEP_ID": "3"}, ["{run}"], "this is a Slurm step without SLURM_PROCID"),
    ("a variable", {}, ["{run}", "--save", "$NOPE/x"], "contains the variable NOPE, which is not set here: export"),
    ("data", {}, ["{run}"], "a_text_document.idx: no such file"),
    ("a script", {}, [], "a script and at least one configuration file are needed"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "env", "words", "said"), WRONG, ids=[case[0] for case in WRONG])
def test_former_tracebacks_are_a_single_message(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    env: dict[str, str],
    words: list[str],
    said: str,
) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(keys()))
    (tmp_path / "latin.yml").write_bytes(b"num_layers: 2 # \xe9\n")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    filled = [word.format(folder=tmp_path, run=tmp_path / "run.yml") for word in words]
    code, text = answer(capsys, deepy_main, str(ROOT / "train.py"), *filled)
    assert code == USER_ERROR, text
    assert text.startswith("deepy.py: ")
    assert said in text


def test_a_missing_configuration_of_a_job_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = answer(
        capsys, render_main, "generic_slurm", "--nodes", "1", "--time", "60", str(tmp_path / "none.yml")
    )
    assert code == USER_ERROR
    assert said.startswith("render.py: ")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], "DeepSpeed ZeRO-3 .*zero_to_fp32.py"),
        (["mp_rank_00_model_states.pt"], "sequential layout .*convert_hf reshard --input .*global_step5 --output NEW"),
        (["model.safetensors", "config.json"], "a Hugging Face folder: convert it: python tools/convert_hf to-neox"),
        (["consolidated.00.pth"], "Meta's release .*to-neox"),
        (["mp_rank_00/"], "a checkpoint of Megatron-LM: it is not read"),
        (["adapter_config.json"], "a peft adapter"),
        ([], "is no checkpoint: it is empty"),
        (["notes.txt"], "is no checkpoint: it holds notes.txt; expected layer files"),
    ],
)
@pytest.mark.parametrize("inside", [True, False], ids=["named by latest", "given itself"])
def test_a_foreign_folder_is_recognized(tmp_path: Path, files: list[str], said: str, inside: bool) -> None:
    folder = tmp_path / "global_step5"
    folder.mkdir()
    for name in files:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"")
    if inside:
        (tmp_path / "latest").write_text("global_step5")
    with pytest.raises(UserError, match=said):
        find_checkpoint(tmp_path if inside else folder)
