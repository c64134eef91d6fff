"""Keys of the model and their rules. Where GPT-NeoX's default is not Llama's, it is Llama's or there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from megatron.common.errors import ConfigError
from megatron.neox_arguments.keys.fields import Keys, derived, key, required
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class RopeScaling(Keys):
    """Frequency scaling of Llama-3.1 and later, as `rope_scaling` in the Hugging Face config."""

    rope_type: Literal["llama3"] = key("llama3", "Scaling rule. `default` (or leaving rope_scaling out) means none.")
    factor: float = required("How much the longest wavelengths are stretched: 8.0 for 3.1, 32.0 for 3.2.", ge=1)
    low_freq_factor: float = required("Wavelengths above original / this are stretched fully: 1.0.", gt=0)
    high_freq_factor: float = required("Wavelengths below original / this are left alone: 4.0.", gt=0)
    original_max_position_embeddings: int = required("Context length before scaling: 8192.", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, value: Any) -> Any:
        """Hugging Face configs before 4.43 spell `rope_type` as `type`."""
        if isinstance(value, dict) and "type" in value and "rope_type" not in value:
            value = {"rope_type" if name == "type" else name: item for name, item in value.items()}
        return value


class ModelKeys(Keys):
    num_layers: int = required("Decoder layers.", gt=0)
    hidden_size: int = required("Width of the residual stream.", gt=0)
    num_attention_heads: int = required("Query heads; head_dim is hidden_size / num_attention_heads.", gt=0)
    num_kv_heads: int = derived(
        "num_attention_heads", "Key/value heads; fewer than query heads is grouped-query attention.", gt=0
    )
    intermediate_size: int = required(
        "True MLP width F, as in the Hugging Face config (8B: 14336, 70B: 28672). GPT-NeoX's 3 x F is refused "
        "unless intermediate_size_convention is neox.",
        gt=0,
    )
    intermediate_size_convention: Literal["hf", "neox"] = key(
        "hf", "What intermediate_size means: hf = the width itself, neox = three times the width.", ours=True
    )
    mlp_multiple_of: int = key(1, "Rounds the MLP width up under the neox convention; must divide it under hf.", gt=0)
    vocab_size: int = required(
        "True number of tokens, as in the Hugging Face config (Llama-3: 128256).", ours=True, gt=0
    )
    make_vocab_size_divisible_by: int = key(
        128, "Vocabulary matrices are padded to a multiple of this x model_parallel_size. Llama-3 presets: 1.", gt=0
    )
    no_weight_tying: bool = required(
        "true: the output head has its own matrix (Llama-3.1); false: it is the embedding (Llama-3.2 1B and 3B)."
    )
    max_position_embeddings: int = required("Longest sequence the model is meant for (Llama-3.1: 131072).", gt=0)
    rms_norm_epsilon: float = required("Added to the variance inside RMSNorm. Llama-3: 1e-5.", gt=0)
    hf_rounding: bool = key(
        False,
        "Round the normalised activations before the weight multiply, as transformers does, instead of once at the "
        "end. For bit-for-bit comparisons in 16 bits.",
        ours=True,
    )
    rotary_emb_base: float = required("Rotary theta. Llama-3: 500000; Llama-2: 10000.", gt=0)
    rope_scaling: RopeScaling | None = key(
        None, "Frequency scaling of Llama-3.1 and later; absent means none.", ours=True
    )
    rotary_pct: float = key(1.0, "Share of head_dim that rotates. Llama: all of it.")
    rotary_save_freqs_buffer: Literal[False] = key(False, "The table is computed, never stored.")
    norm: Literal["rmsnorm"] = key("rmsnorm", "Normalisation. Llama: rmsnorm.")
    pos_emb: Literal["rotary"] = key("rotary", "Position embedding. Llama: rotary.")
    activation: Literal["swiglu"] = key("swiglu", "MLP activation. Llama: swiglu.")
    use_bias_in_attn_linear: Literal[False] = key(False, "Llama has no biases.")
    use_bias_in_mlp: Literal[False] = key(False, "Llama has no biases.")
    gpt_j_residual: Literal[False] = key(False, "Parallel residual; Llama's is sequential.")
    attention_config: list[Any] | None = key(
        None, "GPT-NeoX's list of attention types. flash and global both run scaled_dot_product_attention."
    )
    init_method: Literal["normal", "scaled_normal", "small_init", "wang_init"] = key(
        "normal",
        "Initialisation of a from-scratch run. normal: init_method_std; scaled_normal: that / sqrt(2 num_layers); "
        "small_init: sqrt(2 / (5 hidden_size)); wang_init: 2 / (num_layers sqrt(hidden_size)).",
    )
    output_layer_init_method: Literal["normal", "scaled_normal", "small_init", "wang_init"] = key(
        "scaled_normal", "The same for the two projections into the residual stream."
    )
    init_method_std: float = key(0.02, "Standard deviation of the initialisation.", gt=0)

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


@registry.derivation(*ALL_TASKS)
def kv_heads_default_to_heads(args: ModelKeys, world_size: int | None) -> Derived:
    return Derived({"num_kv_heads": args.num_attention_heads} if args.num_kv_heads is None else {})


@registry.derivation(*ALL_TASKS)
def true_width(args: ModelKeys, world_size: int | None) -> Derived:
    """MLP width F. Under the neox convention the key is 3 F, and GPT-NeoX rounds its two matrices up separately."""
    given = args.intermediate_size
    if args.intermediate_size_convention == "hf":
        return Derived({})
    multiple = args.mlp_multiple_of
    gated = 2 * given // 3  # rows of the first matrix: gate and up projection together
    rows = 2 * multiple * -(-gated // (2 * multiple))
    columns = multiple * -(-(gated // 2) // multiple)
    if rows != 2 * columns:
        raise ConfigError(
            f"intermediate_size {given} with mlp_multiple_of {multiple} gives GPT-NeoX a first MLP matrix of {rows} "
            f"rows and a second of {columns} columns, which do not fit; give 3 x the true width"
        )
    return Derived({"intermediate_size": columns})


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
    if width <= 6 * args.hidden_size:
        return None
    return (
        f"intermediate_size {width} is wider than 6 x hidden_size {args.hidden_size}: it looks like GPT-NeoX's 3 x the "
        f"true width. Write intermediate_size: {width // 3}, as in the Hugging Face config, or "
        f"intermediate_size_convention: neox if {width} is meant as 3 x {width // 3}"
    )


@registry.rule(*ALL_TASKS)
def mlp_multiple_divides_width(args: ModelKeys) -> str | None:
    if args.intermediate_size % args.mlp_multiple_of == 0:
        return None
    return (
        f"mlp_multiple_of {args.mlp_multiple_of} does not divide intermediate_size {args.intermediate_size}; the "
        f"width is never rounded here, leave mlp_multiple_of out"
    )


@registry.rule(*ALL_TASKS)
def whole_head_rotates(args: ModelKeys) -> str | None:
    if args.rotary_pct == 1.0:
        return None
    return f"rotary_pct {args.rotary_pct}: Llama rotates the whole head; leave it out or write 1.0"


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
def attention_is_dense(args: ModelKeys) -> str | None:
    names = list(_attention_types(args.attention_config or []))
    other = sorted({str(name) for name in names if name not in ("flash", "global")})
    if not other:
        return None
    return f"attention_config: {', '.join(other)} not supported; Llama's layers are all dense: flash or global"


def _attention_types(config: list) -> list[object]:
    """Types named in `[[[flash, global], 80]]` or `[flash, global, ...]`."""
    names: list[object] = []
    for entry in config:
        types = entry[0] if isinstance(entry, list) and entry else entry
        names += types if isinstance(types, list) else [types]
    return names


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
        "rope_scaling is absent, but the theta and context are those of Llama-3.1, which scales its frequencies; "
        "without it 35 of 64 frequencies differ at every length"
    )


@registry.warning(*ALL_TASKS)
def attention_config_chooses_nothing(args: ModelKeys) -> str | None:
    if args.attention_config is None:
        return None
    return (
        "attention_config has no effect: every layer runs scaled_dot_product_attention, flash where the device has it"
    )
