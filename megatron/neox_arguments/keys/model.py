"""Keys that describe the model. Where GPT-NeoX's default is not Llama's, the default is Llama's or there is none."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from megatron.neox_arguments.keys.fields import Keys, derived, key, required


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
