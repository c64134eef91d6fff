"""fp16 on the CPU for tests of tiny models, which DeepSpeed refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.models import Case


def allow_fp16() -> None:
    """Make DeepSpeed in this process accept fp16 on the CPU, where torch computes it, slowly."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True


def plain_loop(
    case: Case, batches: list[dict[str, Tensor]], scale: float, interval: int, lr: float, clip: float
) -> tuple[list[tuple[float, float, bool]], dict[str, Tensor]]:
    """Train `transformers`' model in fp16 with fp32 masters, torch's AdamW and torch's GradScaler.

    Returns (loss, loss scale, whether the step was applied) of every step, and the masters after the last one. After
    `interval` steps without an overflow the scale doubles.
    """
    model = case.hugging_face().half()
    masters = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    decayed = [p for p in masters.values() if p.dim() > 1]
    others = [p for p in masters.values() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval, growth_factor=2.0)
    records = []
    for batch in batches:
        before = scaler.get_scale()
        logits = model(input_ids=batch["tokens"]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        model.zero_grad()
        scaler.scale(loss).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.float()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), clip)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        records.append((float(loss.detach()), before, bool(norm.isfinite())))
    return records, {name: p.detach() for name, p in masters.items()}
