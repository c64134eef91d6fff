"""Adapters for tests: random factors under peft's names, trained by peft or in an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron import layout
from megatron.engine.protocol import Engine
from megatron.neox_arguments import NeoXArgs
from tests.support.checkpoint_runs import arguments
from tests.support.engine_runs import build, make_samples
from tests.support.models import LLAMA3_ROPE, Case, rank_part
from tests.support.ranks import run_ranks

RANK, ALPHA = 4, 8
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 2e-3  # at higher ones Adam amplifies rounding from step to step
BATCH, STEPS, CLIPPING = 8, 5, 0.5
GQA = Case(heads=8, kv_heads=4, head_dim=8, layers=4, intermediate=88, vocab=160, rope=LLAMA3_ROPE, seq=24)
MHA = Case(heads=8, kv_heads=8, head_dim=8, layers=4, intermediate=88, vocab=160, seq=24)
TIED = Case(heads=8, kv_heads=4, head_dim=8, layers=4, intermediate=88, vocab=160, tied=True, seq=24)
Layout = tuple[int, int, int]  # TP, PP, DP


def lora_arguments(case: Case, split: Layout, **overrides: Any) -> Any:
    """Arguments of a training of adapters on a case, with eight samples per step."""
    tp, pp, dp = split
    keys = {
        "lora": {"rank": RANK, "alpha": ALPHA},
        "model_parallel_size": tp,
        "pipe_parallel_size": pp,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": BATCH // (2 * dp),
        "gradient_clipping": CLIPPING,
        "checkpoint_activations": True,
        "world_size": tp * pp * dp,
        "optimizer": {"type": "Adam", "params": {"lr": LEARNING_RATE, "betas": [0.9, 0.95], "eps": 1e-8}},
        "from_scratch": False,
        "load": "unused",
    }
    return case.neox(**(keys | overrides))


def adapter_state(case: Case, targets: tuple[str, ...] = ALL, seed: int = 3, rank: int = RANK) -> dict[str, Tensor]:
    """Random A and B by peft's names; B is not zero, so that A learns from the first step."""
    generator = torch.Generator().manual_seed(seed)
    hidden, kv, inner = case.hidden, case.kv_heads * case.head_dim, case.intermediate
    sizes = {
        **{"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)},
        **{"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)},
    }
    state = {}
    for layer in range(case.layers):
        for name in targets:
            features_in, features_out = sizes[name]
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            state[f"{prefix}.lora_A.weight"] = torch.randn(rank, features_in, generator=generator) / features_in**0.5
            state[f"{prefix}.lora_B.weight"] = torch.randn(features_out, rank, generator=generator) * 0.05
    return state


def peft_model(case: Case, state: dict[str, Tensor] | None, seed: int = 0, **config: Any) -> Any:
    """The case's model under peft with the adapter of `state`."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    given = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(ALL), "lora_dropout": 0.0} | config
    model = get_peft_model(case.hugging_face(seed), LoraConfig(task_type="CAUSAL_LM", **given))
    if state is not None:
        assert not set_peft_model_state_dict(model, state).unexpected_keys
    return model


def peft_training(
    case: Case, state: dict[str, Tensor], steps: int, batch: int, clipping: float, **config: Any
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Train with peft and transformers: ([(loss, gradient norm) per step], the trained adapter by peft's names)."""
    from peft.utils import get_peft_model_state_dict

    model = peft_model(case, state, **config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    samples, history = make_samples(case, batch * steps), []
    for number in range(steps):
        chosen = samples[number * batch : (number + 1) * batch]
        logits = model(input_ids=torch.stack([sample["tokens"] for sample in chosen])).logits
        labels = torch.stack([sample["labels"] for sample in chosen])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clipping)
        optimizer.step()
        history.append((float(loss.detach()), float(norm)))
    return history, {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


@torch.no_grad()
def fill_adapter(engine: Engine, state: dict[str, Tensor], args: NeoXArgs) -> None:
    """Copy this rank's part of a whole adapter into the engine."""
    for index, layer in engine.numbered_layers():
        parameters = dict(layer.named_parameters())
        for row in layout.rows_of(index, args.trained_shape):
            whole = state[layout.peft_name(row, index - 2)]
            parameters[row.neox].copy_(rank_part(row, [whole], args, engine.place.tp, engine.place.tp_rank))
    engine.weights_changed()


def moved(engine: Engine) -> dict[tuple[int, str, int], bool]:
    """Whether this rank's part of Adam's first moment is nonzero, by layer, tensor and tp_rank."""
    found: dict[tuple[int, str, int], bool] = {}
    for shard in engine.optimizer_shards():
        key = (shard.where.layer, shard.where.tensor, shard.where.tp_rank)
        found[key] = found.get(key, False) or bool(shard.tensors["exp_avg"].any())
    return found


def without_gradient(ranks: list[dict[tuple[int, str, int], bool]]) -> list[tuple[int, str, int]]:
    """The tensors for which no rank has seen a gradient."""
    keys = {key for rank in ranks for key in rank}
    return sorted(key for key in keys if not any(rank.get(key, False) for rank in ranks))


def build_adapted(args: NeoXArgs, case: Case, state: dict[str, Tensor]) -> Engine:
    """The engine on this rank with the case's weights as its base and the adapter of `state`."""
    engine = build(args, case)
    fill_adapter(engine, state, args)
    return engine


def save_base(rank: int, world_size: int, case: Case, tp: int, precision: str, folder: str, seed: int) -> None:
    from megatron.checkpoint.save import save_checkpoint
    from megatron.checkpoint.state import TrainState

    args = arguments(case, tp, 1, 1, precision=precision, save=folder, checkpoint_factor=1)
    save_checkpoint(build(args, case, seed), args, TrainState(), data_fingerprints={})


def base_of(case: Case, folder: Path, precision: str = "fp32", seed: int = 0) -> str:
    """Write a checkpoint of the case's random weights at TP2; returns its folder."""
    run_ranks(save_base, 2, case, 2, precision, str(folder), seed)
    return str(folder)
