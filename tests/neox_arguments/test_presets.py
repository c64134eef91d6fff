"""The shipped YAML files are valid, have the right sizes and name the schema; schema and table of keys are current."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.load import merge_files, read_yaml
from megatron.neox_arguments.schema import json_schema, updated

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yml") if path.name != "merge.yml")  # a recipe of tools/merge
MODELS = {
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama32_1b": 1_235_814_400,
    "astrollama": 6_738_415_616,
    "tiny": 1_787_008,
}
INTERLEAVED = CONFIGS / "llama31_70b" / "interleaved.yml"  # with a key on the command line
ASTROPT = {
    "1M": 1_770_624,
    "5M": 6_917_376,
    "12M": 14_160_768,
    "21M": 24_517_120,
    "89M": 94_391_040,
    "309M": 318_292_992,
    "830M": 855_705_600,
    "2.1B": 2_117_276_160,
}
ADAPTED = {
    f"{folder}-{run}": [CONFIGS / folder / f"{name}.yml" for name in ("model", run)]
    for folder, run in (("llama31_8b", "lora"), ("llama31_70b", "lora_one_node"), ("astrollama", "lora"))
}
RUNS = (
    ADAPTED
    | {
        f"{folder}-{run}-{machine}": [CONFIGS / folder / f"{name}.yml" for name in ("model", run, machine)]
        for folder, run, machine in (
            ("llama31_70b", "cpt", "frontier"),
            ("llama31_70b", "cpt", "lumi"),
            ("llama31_70b", "sft", "frontier"),
            ("llama31_70b", "sft", "lumi"),
            ("tiny", "run", "local"),
        )
    }
    | {f"astropt-{size}": [CONFIGS / "astropt" / f"{name}.yml" for name in ("recipe", size)] for size in ASTROPT}
)


@pytest.mark.parametrize(("model", "parameters"), MODELS.items())
def test_presets_have_the_published_number_of_parameters(model: str, parameters: int) -> None:
    args = NeoXArgs.from_ymls([CONFIGS / model / "model.yml"], task="model")
    assert args.shape.num_parameters == parameters
    assert args.padded_vocab_size == args.vocab_size
    assert f"{parameters:,} parameters" in (CONFIGS / model / "model.yml").read_text()
    assert args.notes == ()


@pytest.mark.parametrize(("size", "parameters"), ASTROPT.items())
def test_sizes_of_astropt_say_how_many_parameters_they_have(size: str, parameters: int) -> None:
    """Counted by hand: four attention matrices and three of the MLP, two MLPs for the patches, norms."""
    args = NeoXArgs.from_ymls(RUNS[f"astropt-{size}"])
    h, f, layers = args.hidden_size, args.intermediate_size, args.num_layers
    by_hand = layers * (4 * h * h + 3 * h * f + 2 * h) + h + 2 * 4 * h * (16 * 16 * 3 + h)
    assert args.shape.num_parameters == by_hand == parameters
    assert f"{parameters:,} parameters" in (CONFIGS / "astropt" / f"{size}.yml").read_text()
    assert args.train_batch_size == 320
    assert args.min_lr == pytest.approx(args.lr / 10)


@pytest.mark.parametrize(
    ("kv_heads", "parameters"), [(8, 405_853_388_800), (16, 410_081_247_232)], ids=["405B", "405B-mp16"]
)
def test_the_405b(kv_heads: int, parameters: int) -> None:
    changes = {
        "num_layers": 126,
        "hidden_size": 16384,
        "num_attention_heads": 128,
        "num_kv_heads": kv_heads,
        "intermediate_size": 53248,
    }
    args = NeoXArgs.from_ymls([CONFIGS / "llama31_70b" / "model.yml"], changes, task="model")
    assert args.shape.num_parameters == parameters


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_presets_run_at_every_tensor_parallel_size_up_to_eight(tp: int) -> None:
    for model in ("llama31_8b", "llama31_70b", "llama32_1b"):
        args = NeoXArgs.from_ymls([CONFIGS / model / "model"], {"model_parallel_size": tp}, task="model")
        assert args.padded_vocab_size == 128256


def test_only_the_1b_is_tied() -> None:
    tied = {file.parent.name for file in CONFIGS.glob("*/model.yml") if read_yaml(file)[0]["no_weight_tying"] is False}
    assert tied == {"llama32_1b"}


@pytest.mark.parametrize("files", RUNS.values(), ids=RUNS)
def test_shipped_runs_are_valid_without_surprises(files: list[Path]) -> None:
    """No key without effect, no uneven stages, no run without saves; a note on the choice of `auto` is allowed."""
    notes = NeoXArgs.from_ymls(files).notes
    assert [note for note in notes if not note.startswith("precision auto: ")] == []


def test_every_file_is_part_of_a_model_or_a_run_above() -> None:
    loaded = {CONFIGS / model / "model.yml" for model in MODELS} | {INTERLEAVED}
    assert loaded.union(*RUNS.values()) == set(FILES)


@pytest.mark.parametrize("run", ["cpt", "sft"])
def test_virtual_stages_keep_the_layout_of_astrosage(run: str) -> None:
    """With the change of recomputation given in its first lines, but not without it."""
    files = [CONFIGS / "llama31_70b" / f"{name}.yml" for name in ("model", run)]
    args = NeoXArgs.from_ymls([*files, INTERLEAVED], {"checkpoint_activations": False})
    assert (args.engine, args.virtual_pipe_parallel_size, args.recompute) == ("megatron", 5, "none")
    fallback = NeoXArgs.from_ymls(
        [*files, INTERLEAVED.with_name("frontier.yml")], {"sequence_parallel": True, "checkpoint_activations": False}
    )
    sizes = ("model_parallel_size", "pipe_parallel_size", "data_parallel_size", "train_batch_size")
    assert [getattr(args, size) for size in sizes] == [getattr(fallback, size) for size in sizes] == [8, 8, 32, 512]
    assert "`--checkpoint_activations false`" in INTERLEAVED.read_text()


@pytest.mark.parametrize("machine", ["frontier", "lumi"])
@pytest.mark.parametrize("run", ["cpt", "sft"])
def test_the_70b_has_the_layout_of_astrosage(run: str, machine: str) -> None:
    args = NeoXArgs.from_ymls(RUNS[f"llama31_70b-{run}-{machine}"])
    layout = (args.model_parallel_size, args.pipe_parallel_size, args.data_parallel_size, args.global_num_gpus)
    assert layout == (8, 8, 32, 2048)


def test_the_fine_tune_continues_the_pre_training() -> None:
    """It loads the pre-training's checkpoints, and hyperparameters unchanged in the paper are unchanged here."""
    cpt, sft = (read_yaml(CONFIGS / "llama31_70b" / f"{name}.yml")[0] for name in ("cpt", "sft"))
    assert sft["load"] == cpt["save"]
    same = ["optimizer", "train_batch_size", "gradient_clipping", "lr_decay_style", "warmup", "min_lr", "precision"]
    assert [cpt[name] for name in same] == [sft[name] for name in same]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_file_names_the_schema_and_comments_every_key(path: Path) -> None:
    lines = path.read_text().splitlines()
    prefix = "# yaml-language-server: $schema="
    assert lines[0].startswith(prefix)
    assert (path.parent / lines[0].removeprefix(prefix)).resolve() == CONFIGS / "schema.json"
    _, places = merge_files([path])
    for name, place in places.items():
        comment = lines[int(place.rpartition(":")[2]) - 2]
        assert comment.startswith("# "), f"{name} has no comment"
        assert "(" in comment, f"the comment of {name} lacks (type, default)"


def test_the_schema_is_current() -> None:
    """If this fails: python -m megatron.neox_arguments.schema > configs/schema.json"""
    assert json.loads((CONFIGS / "schema.json").read_text()) == json_schema()


def test_the_schema_knows_every_key_of_every_file() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    for path in FILES:
        assert set(read_yaml(path)[0]) <= set(schema["properties"])


def test_the_table_of_keys_is_current() -> None:
    """If this fails: python -m megatron.neox_arguments.schema --update docs/configuration.md"""
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == updated(text)
