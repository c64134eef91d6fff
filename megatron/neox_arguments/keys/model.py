"""Keys of the model and their rules.

What makes a model a Llama (norm, activation, positions, biases) must be given, because GPT-NeoX's defaults build a
different model. Other sizes and constants that differ between Llamas have GPT-NeoX's defaults, and a note names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from megatron.common.errors import ConfigError
from megatron.neox_arguments.keys.fields import Keys, derived, key, required
from megatron.neox_arguments.mlp_width import PUBLISHED, gpt_neox_matrices
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class RopeScaling(Keys):
    """Frequency scaling of Llama-3.1 and later, as `rope_scaling` in the Hugging Face config."""

    rope_type: Literal["llama3"] = key("llama3", "Scaling rule; `default`, like leaving rope_scaling out, means none.")
    factor: float = required("Factor by which the longest wavelengths are stretched. Llama-3.1: 8.0; 3.2: 32.0.", ge=1)
    low_freq_factor: float = required(
        "Wavelengths above original_max_position_embeddings / this are stretched by the whole factor. Llama-3.1: 1.0.",
        gt=0,
    )
    high_freq_factor: float = required(
        "Wavelengths below original_max_position_embeddings / this are unchanged. Llama-3.1: 4.0.", gt=0
    )
    original_max_position_embeddings: int = required("Context length before scaling, in tokens. Llama-3.1: 8192.", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, value: Any) -> Any:
        """Hugging Face configs before 4.43 spell `rope_type` as `type`."""
        if isinstance(value, dict) and "type" in value and "rope_type" not in value:
            value = {"rope_type" if name == "type" else name: item for name, item in value.items()}
        return value


class ModelKeys(Keys):
    num_layers: int = required("Number of decoder layers.", gt=0)
    hidden_size: int = required("Width of the residual stream.", gt=0)
    num_attention_heads: int = required("Number of query heads; head_dim is hidden_size / num_attention_heads.", gt=0)
    num_kv_heads: int = derived(
        "num_attention_heads", "Number of key/value heads; fewer than query heads means grouped-query attention.", gt=0
    )
    intermediate_size: int = derived(
        "expansion_factor x hidden_size, else 4 x hidden_size, as in GPT-NeoX",
        "MLP width, read according to intermediate_size_convention; its final value is the true width, as in the "
        "Hugging Face config (8B: 14336, 70B: 28672).",
        gt=0,
    )
    expansion_factor: float | None = key(None, "intermediate_size as a multiple of hidden_size.", gt=0)
    intermediate_size_convention: Literal["hf", "neox"] = derived(
        "neox with mlp_multiple_of, without intermediate_size, or if intermediate_size is more than 4 x hidden_size; "
        "else hf. The choice is printed",
        "What intermediate_size means. hf: the width itself; neox: GPT-NeoX's rule, about three times the width.",
        ours=True,
    )
    mlp_multiple_of: int = key(
        1, "Round the MLP width up to a multiple of this, by GPT-NeoX's rule; with hf it must divide the width.", gt=0
    )
    vocab_size: int = derived(
        "the size of the tokenizer in vocab_file",
        "Number of tokens in the vocabulary, before padding, as in the Hugging Face config (Llama-3: 128256).",
        ours=True,
        gt=0,
    )
    make_vocab_size_divisible_by: int = key(
        128, "Pad the vocabulary to a multiple of this x model_parallel_size. Llama-3 presets: 1.", gt=0
    )
    no_weight_tying: bool = derived(
        "false, as in GPT-NeoX",
        "Give the output head its own matrix (Llama-3.1); false: it shares the embedding's (Llama-3.2 1B and 3B).",
    )
    max_position_embeddings: int = required(
        "Longest sequence the model is meant for, in tokens (Llama-3.1: 131072).", gt=0
    )
    rms_norm_epsilon: float = derived(
        "1e-8, as in GPT-NeoX", "Added to the mean square in RMSNorm. Llama-2 and 3: 1e-5; Llama-1: 1e-6.", gt=0
    )
    hf_rounding: bool = key(
        False,
        "Round normalized activations before multiplying by the norm's weight, as transformers does, instead of once "
        "at the end; for bit-for-bit comparisons in 16-bit precision.",
        ours=True,
    )
    rotary_emb_base: float = derived(
        "10000, as in GPT-NeoX", "Base (theta) of the rotary frequencies. Llama-3: 500000; Llama-2: 10000.", gt=0
    )
    rope_scaling: RopeScaling | None = key(
        None, "Scaling of the rotary frequencies in Llama-3.1 and later; absent means none.", ours=True
    )
    rotary_pct: float = key(1.0, "Fraction of head_dim that is rotated. Llama: 1.0.")
    rotary_save_freqs_buffer: Literal[False] = key(
        False, "Store the rotary table in checkpoints: never, it is computed."
    )
    norm: Literal["rmsnorm"] = required("Normalization. Llama: rmsnorm (GPT-NeoX's default: layernorm).")
    pos_emb: Literal["rotary"] = required("Position embedding. Llama: rotary (GPT-NeoX's default: learned).")
    activation: Literal["swiglu"] = required("MLP activation. Llama: swiglu (GPT-NeoX's default: gelu).")
    use_bias_in_attn_linear: Literal[False] = required(
        "Biases in attention projections. Llama has none (GPT-NeoX's default: true)."
    )
    use_bias_in_mlp: Literal[False] = key(False, "Biases in the MLP. Llama has none (GPT-NeoX's default: true).")
    gpt_j_residual: Literal[False] = key(False, "Attention and MLP in parallel. In Llama the MLP follows attention.")
    init_method: Literal["normal", "scaled_normal", "small_init", "wang_init"] = key(
        "normal",
        "Standard deviation of initial weights. normal: init_method_std; scaled_normal: init_method_std / sqrt(2 "
        "num_layers); small_init: sqrt(2 / (5 hidden_size)); wang_init: 2 / (num_layers sqrt(hidden_size)).",
    )
    output_layer_init_method: Literal["normal", "scaled_normal", "small_init", "wang_init"] = key(
        "scaled_normal", "As init_method, for attention's output projection and the MLP's down projection."
    )
    init_method_std: float = key(0.02, "Standard deviation that normal and scaled_normal use.", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _no_scaling(cls, value: Any) -> Any:
        """`rope_type: default` is Hugging Face's way of saying that there is no scaling."""
        scaling = value.get("rope_scaling") if isinstance(value, dict) else None
        if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
            value = {name: item for name, item in value.items() if name != "rope_scaling"}
        return value

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# --- derivations


@registry.derivation(*ALL_TASKS, fills=("num_kv_heads",))
def kv_heads_default_to_heads(args: ModelKeys, world_size: int | None) -> Derived:
    return Derived({"num_kv_heads": args.num_attention_heads} if args.num_kv_heads is None else {})


# Constants that differ between Llamas: GPT-NeoX's default, and which models differ.
_DEFAULTS: dict[str, tuple[Any, str]] = {
    "no_weight_tying": (
        False,
        "the output head shares the embedding's matrix; all Llamas except the 3.2 1B and 3B have true",
    ),
    "rms_norm_epsilon": (1e-8, "Llama-2 and 3 have 1e-5, Llama-1 1e-6"),
    "rotary_emb_base": (10000.0, "Llama-3 has 500000"),
}


@registry.derivation(*ALL_TASKS, fills=("no_weight_tying", "rms_norm_epsilon", "rotary_emb_base"))
def constants_of_gpt_neox(args: AllKeys, world_size: int | None) -> Derived:
    absent = {name: _DEFAULTS[name] for name in _DEFAULTS if getattr(args, name) is None}
    if args.modality == "patches":  # there is no vocabulary matrix to share
        absent.pop("no_weight_tying", None)
    notes = (
        f"{name} is not given: GPT-NeoX's default {'false' if value is False else f'{value:g}'} applies ({who})"
        for name, (value, who) in absent.items()
    )
    values = {name: value for name, (value, _) in absent.items()}
    return Derived(values | ({"no_weight_tying": True} if args.modality == "patches" else {}), tuple(notes))


@registry.derivation(*ALL_TASKS, fills=("intermediate_size", "intermediate_size_convention"))
def true_width(args: ModelKeys, world_size: int | None) -> Derived:
    """The true MLP width, and a note on how it was determined unless intermediate_size_convention is given."""
    given, multiple, hidden = args.intermediate_size, args.mlp_multiple_of, args.hidden_size
    if given is not None and args.expansion_factor is not None:
        raise ConfigError("intermediate_size and expansion_factor are both given; keep one")
    asked = args.intermediate_size_convention
    if given is None:
        given, source = int((args.expansion_factor or 4) * hidden), f"{args.expansion_factor or 4:g} x hidden_size ="
    else:
        source = "intermediate_size"
    matrices = gpt_neox_matrices(given, multiple)
    convention = asked or ("neox" if multiple > 1 or source != "intermediate_size" or given > 4 * hidden else "hf")
    if convention == "hf":
        other = f"GPT-NeoX would build {matrices.columns}" if matrices.fit else "GPT-NeoX's rule gives no MLP that fits"
        note = (
            f"MLP width {given}: intermediate_size is read as the true width ({other}); "
            f"write intermediate_size_convention: hf or neox to say which is meant"
        )
    elif not matrices.fit:
        raise ConfigError(
            f"{source} {given} with mlp_multiple_of {multiple} gives GPT-NeoX a first MLP matrix of {matrices.rows} "
            f"rows and a second of {matrices.columns} columns, which do not fit; give 3 x the true width, or "
            f"intermediate_size_convention: hf if {given} is the width itself"
        )
    else:
        note = (
            f"MLP width {matrices.columns}: GPT-NeoX's reading of {source} {given}"
            + (f" with mlp_multiple_of {multiple}" if multiple > 1 else "")
            + ("" if source == "intermediate_size" else "; intermediate_size is not given")
        )
    width = given if convention == "hf" else matrices.columns
    values = {"intermediate_size": width, "intermediate_size_convention": convention}
    return Derived(values, () if asked else (note,))


# --- rules


@registry.rule(*ALL_TASKS)
def heads_divide_hidden(args: ModelKeys) -> str | None:
    if args.hidden_size % args.num_attention_heads == 0 and args.head_dim % 2 == 0:
        return None
    return (
        f"hidden_size {args.hidden_size} is not num_attention_heads {args.num_attention_heads} x an even head "
        f"dimension; change one of them"
    )


@registry.rule(*ALL_TASKS)
def kv_heads_divide_heads(args: ModelKeys) -> str | None:
    if args.num_attention_heads % args.num_kv_heads == 0:
        return None
    return (
        f"num_kv_heads {args.num_kv_heads} does not divide num_attention_heads {args.num_attention_heads}; each "
        f"key/value head serves the same number of query heads"
    )


@registry.rule(*ALL_TASKS)
def width_is_true(args: ModelKeys) -> str | None:
    width = args.intermediate_size
    if args.intermediate_size_convention == "neox" or width <= 6 * args.hidden_size:
        return None
    return (
        f"intermediate_size {width} is wider than 6 x hidden_size {args.hidden_size}: it looks like GPT-NeoX's 3 x the "
        f"true width. Write intermediate_size: {width // 3}, as in the Hugging Face config, or leave "
        f"intermediate_size_convention out if {width} is meant as 3 x {width // 3}"
    )


@registry.rule(*ALL_TASKS)
def mlp_multiple_divides_width(args: ModelKeys) -> str | None:
    if args.intermediate_size_convention == "neox" or args.intermediate_size % args.mlp_multiple_of == 0:
        return None
    return (
        f"mlp_multiple_of {args.mlp_multiple_of} does not divide intermediate_size {args.intermediate_size}; the "
        f"hf convention never rounds; leave mlp_multiple_of out"
    )


@registry.rule(*ALL_TASKS)
def rope_frequencies_are_ordered(args: ModelKeys) -> str | None:
    scaling = args.rope_scaling
    if scaling is None or scaling.low_freq_factor < scaling.high_freq_factor:
        return None
    return (
        f"rope_scaling: low_freq_factor {scaling.low_freq_factor} must be below high_freq_factor "
        f"{scaling.high_freq_factor} (Llama-3.1: 1.0 and 4.0)"
    )


@registry.rule(*ALL_TASKS)
def positions_cover_sequence(args: AllKeys) -> str | None:
    if args.seq_length is None or args.seq_length <= args.max_position_embeddings:
        return None
    return (
        f"seq_length {args.seq_length} is longer than max_position_embeddings {args.max_position_embeddings}; "
        f"shorten seq_length"
    )


@registry.warning(*ALL_TASKS)
def rope_scaling_is_forgotten(args: ModelKeys) -> str | None:
    if args.rope_scaling or args.max_position_embeddings <= 8192 or args.rotary_emb_base != 500000:
        return None
    return (
        "rope_scaling is absent, but rotary_emb_base and max_position_embeddings are those of Llama-3.1, which scales "
        "its frequencies; without scaling, 35 of 64 frequencies differ, whatever the sequence length"
    )


@registry.warning(*ALL_TASKS)
def width_is_not_the_published_one(args: ModelKeys) -> str | None:
    """GPT-NeoX's own Code Llama files leave the width out."""
    sizes = (args.num_layers, args.hidden_size, args.num_attention_heads, args.num_kv_heads)
    width, name = PUBLISHED.get(sizes, (args.intermediate_size, ""))
    if width == args.intermediate_size:
        return None
    three_fold = args.intermediate_size_convention == "neox"
    return (
        f"the MLP width {args.intermediate_size} is not the {width} of {name}, whose other sizes this model has. For "
        f"its weights write intermediate_size: {3 * width if three_fold else width}"
        + (f" (GPT-NeoX's 3 x {width})" if three_fold else "")
    )


@registry.warning(*ALL_TASKS)
def mlp_biases_are_left_out(args: AllKeys) -> str | None:
    if args.merged.get("use_bias_in_mlp") is not None:
        return None
    return (
        "use_bias_in_mlp is not given: GPT-NeoX's default true would add biases that no Llama checkpoint has, so it is "
        "taken as false"
    )
