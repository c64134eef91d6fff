"""Keys of logging, evaluation intervals, generation and kernels, and their rules."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from megatron.neox_arguments.keys.fields import Keys, derived, key
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class RuntimeKeys(Keys):
    log_interval: int = key(100, "Iterations between progress lines.", gt=0)
    log_dir: str | None = key(None, "Folder for metrics.jsonl, one JSON object per progress line.")
    tensorboard_dir: str | None = key(None, "Folder for TensorBoard event files.")
    use_wandb: bool = key(
        False, "Log to Weights & Biases (extra `wandb`); an API key in the environment alone does not turn it on."
    )
    wandb_project: str = key("neox", "Weights & Biases project of the run.")
    wandb_group: str | None = key(None, "Weights & Biases group of the run.")
    wandb_run_name: str | None = key(None, "Name of the run in Weights & Biases.")
    wandb_team: str | None = key(None, "Weights & Biases team (entity) of the run.")
    wandb_host: str = key("https://api.wandb.ai", "URL of the Weights & Biases server.")
    wall_clock_breakdown: bool = key(
        False, "Print DeepSpeed's timers of forward pass, backward pass and optimizer step."
    )
    eval_interval: int = key(1000, "Iterations between evaluations.", gt=0)
    eval_iters: int = key(100, "Global batches per evaluation of each source; 0 turns evaluation off.", ge=0)
    kernels: Literal["auto", "reference", "required"] = key(
        "auto",
        "Implementation of fused operations. auto: compiled kernels that pass their self-test, else PyTorch; "
        "reference: PyTorch only; required: stop if kernels are missing.",
        ours=True,
    )
    gemm_library: Literal["default", "hipblaslt", "rocblas"] = key(
        "default",
        "Library for matrix products on ROCm; default is torch's choice. The preflight times hipblaslt and rocblas on "
        "the configured model and reports which is faster.",
        ours=True,
    )
    log_param_norm: bool = key(False, "Log the norm of every parameter, as parameter_norms/NAME.")
    text_gen_type: Literal["unconditional", "input-file", "interactive"] = derived(
        "input-file with sample_input_file, else interactive with chat, else unconditional",
        "What generate.py continues. unconditional: nothing; input-file: the prompts of sample_input_file; "
        "interactive: prompts that you type (on one rank).",
    )
    sample_input_file: str | None = key(
        None, "File of prompts: text with one per line, or `.jsonl` (docs/generation.md)."
    )
    sample_output_file: str = key("samples.txt", "Output file for generated texts, one JSON object per line.")
    eval_results_prefix: str = key("", "eval.py writes its results to PREFIXeval_results.json.")
    maximum_tokens: int = key(64, "Longest generated text, in tokens.", gt=0)
    num_samples: int = key(1, "Number of texts to generate for each prompt.", gt=0)
    temperature: float = key(0.0, "Sampling temperature; 0 takes the most likely token.", ge=0)
    top_p: float = key(
        0.0,
        "Nucleus sampling: sample from the fewest tokens whose probabilities add up to this; 0 is off.",
        ge=0,
        le=1,
    )
    top_k: int = key(0, "Sample among the k most likely tokens; 0 is off.", ge=0)


# --- derivations


@registry.derivation(*ALL_TASKS, fills=("text_gen_type",))
def text_of_the_prompts(args: RuntimeKeys, world_size: int | None) -> Derived:
    if args.text_gen_type is not None:
        return Derived({})
    return Derived({"text_gen_type": "input-file" if args.sample_input_file else "unconditional"})


# --- rules


@registry.rule("generate")
def prompts_have_a_file(args: RuntimeKeys) -> str | None:
    if args.text_gen_type != "input-file" or args.sample_input_file:
        return None
    return "text_gen_type input-file needs sample_input_file (-i): a text file with one prompt per line"


@registry.warning("generate")
def prompts_are_not_read(args: RuntimeKeys) -> str | None:
    if args.text_gen_type == "input-file" or args.sample_input_file is None:
        return None
    return f"sample_input_file {args.sample_input_file} is not read: text_gen_type is {args.text_gen_type}"


@registry.warning("train")
def wandb_is_not_installed(args: RuntimeKeys) -> str | None:
    """As in GPT-NeoX the run continues without it; files that set it are also checked on machines without wandb."""
    if not args.use_wandb or find_spec("wandb"):
        return None
    return "use_wandb is true, but wandb is not installed here: nothing is logged there without pip install wandb"


@registry.warning("train")
def wandb_is_not_switched_on(args: AllKeys) -> str | None:
    names = [name for name in ("wandb_group", "wandb_team", "wandb_run_name") if getattr(args, name) is not None]
    if not names or args.merged.get("use_wandb") is not None:
        return None
    return (
        f"{', '.join(names)} without use_wandb: GPT-NeoX logs to Weights & Biases if it finds an API key, this project "
        f"only with use_wandb: true"
    )
