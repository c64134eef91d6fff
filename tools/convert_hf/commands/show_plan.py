"""The output of `--plan`: the sources, targets and bytes of a job."""

from __future__ import annotations

from megatron.common.quantity import quantity

from ..stream.publish import OutputFolder


def plan_text(output: OutputFolder) -> str:
    plan = output.plan
    sources: dict[str, int] = {}
    for tensor in plan.sources.values():
        for region in tensor.regions:
            size = region.rows * region.cols * tensor.dtype.itemsize
            sources[str(region.stored.path)] = sources.get(str(region.stored.path), 0) + size
    lines = [f"read {plan.bytes_read:,} bytes from {quantity(len(sources), 'file')}"]
    lines += [f"  {size:>18,}  {path}" for path, size in sorted(sources.items())]
    lines.append(f"write {plan.bytes_written:,} bytes to {quantity(len(plan.files), 'weight file')} in {output.final}")
    for file in plan.files:
        lines.append(f"  {file.size:>18,}  {file.name}")
        for target in file.tensors:
            shape = "x".join(map(str, target.stored.shape))
            origin = ", ".join(dict.fromkeys(r.logical or "zero padding" for r in target.regions))
            lines.append(f"  {'':>18}    {target.stored.name} {shape} {target.stored.dtype.name} <- {origin}")
    if states := output.optimizer:
        lines.append(
            f"write {states.bytes_written:,} bytes of optimizer state for TP {states.split.tp}, PP {states.pp}, DP "
            f"{states.dp} to {quantity(len(states.names), 'file')}, from {len(states.source_files)}"
        )
        lines += [f"  {plan.size:>18,}  {name}" for name, plan in zip(states.names, states.plans, strict=True)]
    lines.append("and " + ", ".join(sorted([*output.extras, "manifest.json"])))
    lines.append(
        f"{len(plan.jobs)} bands of at most {plan.band:,} bytes, {output.threads} threads; nothing was written"
    )
    return "\n".join(lines)
