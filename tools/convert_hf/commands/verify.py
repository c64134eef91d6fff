"""`verify`: compare settings, tensors and, with --forward, activations; report what differs first, and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron.layout import PATCHES

from ..errors import ConvertError
from ..sources.checkpoint import Checkpoint
from ..verify.compare import Difference, compare
from ..verify.diagnose import weight_causes

_SHOWN = 12  # differing tensors that are listed one by one


@dataclass
class VerificationReport:
    """Whether two checkpoints are equal, and the lines that `verify` prints."""

    equal: bool
    lines: list[str] = field(default_factory=list)


def verify(
    one: Checkpoint,
    two: Checkpoint,
    *,
    forward: bool = False,
    tokens: Path | None = None,
    tolerance: float = 1e-4,
    device: str = "cpu",
    band: int = 16 << 20,
    threads: int = 4,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> VerificationReport:
    """Compare two checkpoints of any kind; the lines are what the command prints."""
    images = [checkpoint for checkpoint in (one, two) if checkpoint.shape.modality == PATCHES]
    if forward and images:
        raise ConvertError(
            f"--forward supports text models only, and {images[0].root} is an image model; without --forward all "
            f"tensors and settings are compared"
        )
    settings, setting_causes, unknown = _settings(one, two)
    differences = compare(one, two, band, threads, progress)
    report = VerificationReport(not settings and not differences, settings + unknown)
    names = [d.name for d in differences]
    report.lines += _table(differences, sum(1 for n in one.tensors if n in two.tensors))
    causes = setting_causes + weight_causes(one, two, [d.name for d in differences if not d.problem])
    if forward:
        lines, diverged = _forward(one, two, tokens, tolerance, device, band)
        report.lines += lines
        report.equal &= not diverged
    report.lines += [f"cause: {cause}" for cause in causes]
    if names and not causes:
        report.lines.append("cause: none of the known patterns (the values themselves differ)")
    report.lines.append("EQUAL" if report.equal else "DIFFERENT")
    return report


def verification_band(max_ram: int, threads: int) -> int:
    """Size in bytes of a band that keeps the memory of comparing with `threads` threads under `max_ram` bytes."""
    # Each thread holds a band of both, the second possibly in a type twice as wide, and a few MB where they differ.
    budget = max_ram - (320 << 20) - threads * (8 << 20)
    return max(256 << 10, min(4 << 20, budget // (threads * 4)))


def _settings(one: Checkpoint, two: Checkpoint) -> tuple[list[str], list[str], list[str]]:
    """Differing settings, their causes, and remarks."""
    a, b = one.run_settings(), two.run_settings()
    if a is None or b is None:
        missing = (one if a is None else two).root
        return [], [], [f"no file at {missing} gives its epsilon and rotary settings: they are not compared"]
    lines, causes = [], []
    patches = [checkpoint.config.patches if checkpoint.config else None for checkpoint in (one, two)]
    if patches[0] != patches[1] and None not in patches:
        lines.append(f"patches: {json.dumps(patches[0])} in {a.origin}, {json.dumps(patches[1])} in {b.origin}")
        causes.append("images are cut into patches, ordered or scaled differently")
    for key, first, second in a.differences(b):
        lines.append(f"{key}: {json.dumps(first)} in {a.origin}, {json.dumps(second)} in {b.origin}")
        if key == "rope_scaling" and (first is None or second is None):
            causes.append(f"rope scaling is missing in {(a if first is None else b).origin}")
        else:
            what = {"rms_norm_epsilon": "epsilon", "rotary_emb_base": "rotary base"}.get(key, "rope scaling")
            causes.append(f"{what} differs: {json.dumps(first)} and {json.dumps(second)}")
    return lines, causes, []


def _table(differences: list[Difference], count: int) -> list[str]:
    if not differences:
        return [f"all {count} tensors are equal"]
    lines = [d.text() for d in differences[:_SHOWN]]
    if len(differences) > _SHOWN:
        lines.append(f"... and {len(differences) - _SHOWN} more tensors differ")
    lines.append(f"{len(differences)} differences in {count} tensors; the first is {differences[0].name}")
    return lines


def _forward(
    one: Checkpoint,
    two: Checkpoint,
    tokens: Path | None,
    tolerance: float,
    device: str,
    band: int,
) -> tuple[list[str], bool]:
    """The lines to print, and whether a layer diverges beyond the tolerance."""
    from ..verify.forward import compare_forward, default_tokens, read_tokens

    vocabulary = min(one.shape.vocab_size, two.shape.vocab_size)
    ids = list(read_tokens(tokens.read_text())) if tokens else default_tokens(vocabulary)
    # A band is held as stored and in fp32, and both again while the next band is read.
    report = compare_forward(one, two, ids, band // 4, tolerance, device)
    lines = [f"forward pass of {len(ids)} tokens", f"  {'':<12}{'max abs':>12}{'relative':>12}"]
    lines += [f"  {r.name:<12}{r.max_abs:>12.3g}{r.relative:>12.3g}" for r in report.layers]
    lines.append(f"  KL of the logits {report.kl:.3g} nats, same first token at {report.same_top:.1%} of positions")
    if report.first is not None:
        lines.append(f"first to diverge (beyond {tolerance:g}): {report.first}")
    else:
        lines.append(f"no layer diverges beyond {tolerance:g}")
    return lines, report.first is not None
