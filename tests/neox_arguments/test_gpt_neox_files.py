"""Files written for GPT-NeoX: a Llama is read as by GPT-NeoX, and another model is rejected as such first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.family import DECIDING
from megatron.neox_arguments.mlp_width import PUBLISHED, gpt_neox_matrices
from megatron.neox_arguments.unsupported import NESTED_WITHOUT_EFFECT
from tests.support.configurations import VALID, keys
from tests.support.gpt_neox_files import LLAMA, MACHINE, TRAINING

pytestmark = pytest.mark.unit


def test_llama_files_are_accepted_unchanged() -> None:
    args = NeoXArgs.from_dict({**LLAMA, **TRAINING, **MACHINE})
    assert (args.pipe_parallel_size, args.zero_optimization.stage, args.launcher) == (1, 1, "auto")
    assert (args.precision, args.tokenizer_type, args.rotary_emb_base) == ("fp16", "GPT2BPETokenizer", 10000)
    assert args.intermediate_size == 352
    expected = [
        "without effect here: ",
        "rotary_emb_base is not given: GPT-NeoX's default 10000 applies (Llama-3 has 500000)",
        "MLP width 352: GPT-NeoX's reading of intermediate_size 1024 with mlp_multiple_of 32",
        "pipe_parallel_size 0 ",
        "launcher pdsh is taken as auto: in a Slurm allocation deepy.py itself starts all nodes with srun",
        "zero_optimization stage 0 is taken as 1",
        "tokenizer_type is not given: GPT2BPETokenizer, GPT-NeoX's default",
        "vocab_size is taken from the tokenizer, but vocab_file data/gpt2-vocab.json is not on this machine",
        "use_bias_in_mlp is not given: GPT-NeoX's default true",
    ]
    assert len(args.notes) == len(expected)
    assert all(note.startswith(start) for note, start in zip(args.notes, expected, strict=True))


def test_keys_without_effect_are_one_note() -> None:
    note = NeoXArgs.from_dict({**LLAMA, **TRAINING, **MACHINE}).notes[0]
    named = {
        *("rope_fusion", "attention_config", "scaled_upper_triang_masked_softmax_fusion", "partition_activations"),
        *("synchronize_each_layer", "override_lr_scheduler", "steps_per_print", "hostfile", "deepspeed_slurm"),
        *("comment", "fp16.fp16", "zero_optimization.overlap_comm", "optimizer.params.max_grad_norm"),
    }
    assert all(name in note for name in named)
    assert "bias_gelu_fusion" not in note, "false says nothing"
    assert "comms_logger" not in note, "a mapping that is off says nothing"


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, names in NESTED_WITHOUT_EFFECT.items() for name in names]
)
def test_parts_of_mappings_without_effect_are_noted(path: str, name: str) -> None:
    mapping: dict[str, Any] = {name: 1}
    if path == "optimizer.params":
        path, mapping = "optimizer", {"type": "Adam", "params": {"lr": 1e-3, name: 1}}
    args = NeoXArgs.from_dict(keys(**{path: mapping}))
    assert any(name in note for note in args.notes if note.startswith("without effect here"))
    assert args.deepspeed_config.get(path, {}).get(name) is None


# --- widths: what GPT-NeoX builds, computed by running its modules


@pytest.mark.parametrize(
    ("given", "multiple", "hidden", "width", "word"),
    [
        (32768, 256, 4096, 11008, "GPT-NeoX's reading of intermediate_size 32768 with mlp_multiple_of 256"),
        (40960, 256, 5120, 13824, "GPT-NeoX's reading"),
        (53248, 256, 6656, 17920, "GPT-NeoX's reading"),
        (65536, 256, 8192, 22016, "GPT-NeoX's reading"),
        (14336, 14336, 4096, 14336, "GPT-NeoX's reading of intermediate_size 14336 with mlp_multiple_of 14336"),
        (86016, 1, 8192, 28672, "GPT-NeoX's reading of intermediate_size 86016"),
        (3072, 1, 512, 1024, "GPT-NeoX's reading of intermediate_size 3072"),
        (None, 256, 4096, 5632, "4 x hidden_size = 16384 with mlp_multiple_of 256; intermediate_size is not given"),
        (None, 1, 4096, 5461, "4 x hidden_size = 16384; intermediate_size is not given"),
        (14336, 1, 4096, 14336, "read as the true width (GPT-NeoX's rule gives no MLP that fits)"),
        (28672, 1, 8192, 28672, "read as the true width (GPT-NeoX would build 9557)"),
    ],
)
def test_the_width_is_read_as_by_gpt_neox_and_printed(
    given: int | None, multiple: int, hidden: int, width: int, word: str
) -> None:
    sizes = {"hidden_size": hidden, "num_attention_heads": 8, "intermediate_size_convention": None}
    args = NeoXArgs.from_dict(keys(intermediate_size=given, mlp_multiple_of=multiple, **sizes), task="model")
    assert args.intermediate_size == width
    assert sum(f"MLP width {width}: " in note and word in note for note in args.notes) == 1


def test_an_expansion_factor_is_a_width() -> None:
    sizes = {"intermediate_size_convention": None, "hidden_size": 4096}
    args = NeoXArgs.from_dict(keys(intermediate_size=None, expansion_factor=8, mlp_multiple_of=256, **sizes))
    assert args.intermediate_size == 11008
    with pytest.raises(ConfigError, match="intermediate_size and expansion_factor are both given"):
        NeoXArgs.from_dict(keys(expansion_factor=8))


def test_three_times_a_width_is_that_width() -> None:
    """The value advised by the messages, for every published width."""
    for width, _ in PUBLISHED.values():
        assert gpt_neox_matrices(3 * width, 1) == (2 * width, width)
        assert gpt_neox_matrices(3 * width, 256) == (2 * width, width)


def test_a_width_that_is_not_the_published_one_is_named() -> None:
    """GPT-NeoX's file for Code Llama 34B omits the width."""
    sizes = {"num_layers": 48, "hidden_size": 8192, "num_attention_heads": 64, "num_kv_heads": 8}
    changes = {"intermediate_size": None, "intermediate_size_convention": None, "mlp_multiple_of": 256}
    note = next(
        note for note in NeoXArgs.from_dict(keys(**sizes, **changes), task="model").notes if "Code Llama 34B" in note
    )
    assert "the MLP width 11008 is not the 22016 of Code Llama 34B, whose other sizes this model has" in note
    assert "write intermediate_size: 66048 (GPT-NeoX's 3 x 22016)" in note
    followed = NeoXArgs.from_dict(keys(**sizes, **changes | {"intermediate_size": 66048}), task="model")
    assert followed.intermediate_size == 22016
    assert not any("Code Llama" in note for note in followed.notes)


# --- the vocabulary


def test_the_vocabulary_is_the_tokenizer_s(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    args = NeoXArgs.from_dict(keys(vocab_size=None, **files))
    assert (args.vocab_size, args.tokenizer_type) == (4, "GPT2BPETokenizer")
    assert f"vocab_size 4: taken from the tokenizer in {tmp_path}/vocab.json" in args.notes
    assert NeoXArgs.from_dict(keys(vocab_size=4096, **files)).vocab_size == 4096, "a given number stays"


def test_a_vocabulary_that_is_elsewhere_can_be_printed_but_not_built() -> None:
    args = NeoXArgs.from_dict(keys(vocab_size=None, vocab_file="nowhere/tokenizer.json"))
    assert args.vocab_size is None
    with pytest.raises(ConfigError, match=r"vocab_file nowhere/tokenizer\.json is not on this machine"):
        _ = args.shape
    again = NeoXArgs.from_json(args.to_json())
    assert (again.vocab_size, again.notes) == (None, args.notes)


def test_a_broken_tokenizer_is_one_of_the_things_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"2 things are wrong(?s:.)*not a Hugging Face tokenizer\.json(?s:.)*min_lr"):
        NeoXArgs.from_dict(keys(vocab_size=None, vocab_file=str(tmp_path / "tokenizer.json"), min_lr=1.0))


# --- other models


GPT = {"norm": "layernorm", "activation": None, "use_bias_in_attn_linear": None}
OTHERS: list[tuple[dict[str, Any], str, str]] = [
    (GPT, "a GPT", "norm: layernorm; not given, so GPT-NeoX's default applies: activation (gelu), use_bias_in_attn"),
    ({"activation": "gelu"}, "a GPT", "activation: gelu"),
    ({"activation": "geglu"}, "a GPT", "activation: geglu"),
    ({"pos_emb": "alibi"}, "a GPT", "pos_emb: alibi"),
    ({"use_bias_in_mlp": True}, "a GPT", "use_bias_in_mlp: true"),
    ({"gpt_j_residual": True, "rotary_pct": 0.25}, "a GPT", "gpt_j_residual: true; rotary_pct: 0.25"),
    ({"moe_num_experts": 8}, "a mixture of experts", "moe_num_experts: 8"),
    ({"attention_config": [[["mamba"], 4]]}, "a Mamba model", "attention_config: mamba"),
    ({"attention_config": ["rwkv", "flash", "flash", "flash"]}, "an RWKV model", "attention_config: rwkv"),
    ({"attention_config": [[["gmlp"], "all"]]}, "a gMLP", "attention_config: gmlp"),
    ({"attention_config": [[["local", "global"], "all"]]}, "a GPT with sparse attention", "attention_config: local"),
    ({"sliding_window_width": 4096}, "a model with a sliding window (Mistral)", "sliding_window_width: 4096"),
    ({"use_qk_layernorm": True}, "another kind of transformer", "use_qk_layernorm: true"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "reason"), OTHERS)
def test_another_model_is_rejected_first_with_all_reasons(changes: dict, kind: str, reason: str) -> None:
    wrong = {"min_lr": 1.0, "train_iters": "10", "te_mha": True, "gas": 4}
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict(keys(**changes, **wrong))
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 things are wrong:"
    assert lines[1].startswith(f"  - this is not a dense Llama but {kind}")
    assert reason in lines[1]
    rest = "\n".join(lines[2:])
    assert all(word in rest for word in ("min_lr 1.0", "train_iters: given '10'", "te_mha", "gradient_accumulation"))


@pytest.mark.parametrize("name", DECIDING)
def test_keys_that_define_a_llama_have_no_defaults(name: str) -> None:
    """GPT-NeoX would build another model from the same file."""
    llama, default = DECIDING[name]
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict(keys(**{name: None}))
    text = str(caught.value)
    assert f"GPT-NeoX's default applies: {name} ({str(default).lower()})" in text
    assert f"If it is meant to be a Llama, write {name}: {str(llama).lower()}" in text
    assert "things are wrong" not in text


def test_preference_training_is_named() -> None:
    changes = {"train_impl": "dpo", "dataset_impl": "pairwise", "dpo_beta": 0.1}
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict(keys(**changes))
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  - this is preference or reinforcement training (train_impl: dpo, dataset_impl: pair")
    assert "dpo_beta: 0.1 is not supported" in lines[2]


def test_files_without_a_model_are_not_called_another_model() -> None:
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict({**TRAINING, **MACHINE})
    assert "dense Llama but" not in str(caught.value)
    assert "num_layers is missing" in str(caught.value)


# --- old words


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"gas": 4}, "write gradient_accumulation_steps: 4"),
        ({"warmup_iters": 5}, "write warmup: 0.5 (5 of 10 iterations)"),
        ({"decay_lr_to": 0.1}, "write min_lr: 0.0001 (0.1 of the peak 0.001)"),
        ({"save_interval": 7}, "write checkpoint_factor: 7"),
        ({"attention_type": "groupedquery"}, "num_kv_heads says how many query heads share a key/value head"),
        ({"mlp_type": "regular"}, "activation selects the MLP"),
        ({"mlp_type": "llama"}, "write activation: swiglu, and intermediate_size: 1056 (3 x the width, which was 352)"),
        ({"tie_word_embeddings": False}, "write no_weight_tying: true"),
        ({"rope_theta": 500000.0}, "write rotary_emb_base: 500000.0"),
    ],
)
def test_old_keys_are_answered_with_the_current_key_and_value(changes: dict, answer: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict(keys(**changes))
    name = next(iter(changes))
    assert str(caught.value).startswith(f"{name} is not a key of current GPT-NeoX; ")
    assert answer in str(caught.value)


def test_silu_of_an_old_llama_config_means_swiglu() -> None:
    sizes = {"hidden_size": 6656, "intermediate_size": None, "intermediate_size_convention": None}
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict(keys(activation="silu", mlp_type="llama", **sizes))
    text = str(caught.value)
    assert text.startswith(
        "2 things are wrong:\n  - activation: silu meant the gated MLP together with mlp_type: llama"
    )
    assert "intermediate_size: 53760 (3 x 17920, the width that the old MLP took for hidden_size 6656)" in text


def test_words_are_compared_without_their_case() -> None:
    args = NeoXArgs.from_dict(keys(launcher="SLURM", norm="RMSNorm", precision="BFloat16"))
    assert (args.launcher, args.norm, args.precision) == ("slurm", "rmsnorm", "bfloat16")


def test_a_clean_configuration_has_no_note() -> None:
    assert NeoXArgs.from_dict(VALID).notes == ("save is not given: this run writes no checkpoint",)
