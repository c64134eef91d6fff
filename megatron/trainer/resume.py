"""A job that is started again goes on where it was, with the command it was first started with.

A batch system requeues the same script, and `load: converted weights, finetune: true` would begin at iteration 0 every
time. So a run whose `save` folder holds its checkpoints continues from the last of them, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.checkpoint.discovery import LATEST
from megatron.neox_arguments import NeoXArgs


def is_own_save(args: NeoXArgs) -> bool:
    """Whether the run continues from the folder that it saves to."""
    return bool(args.save and args.load) and Path(args.load or "").resolve() == Path(args.save or "").resolve()


def where_to_start(args: NeoXArgs, device: torch.device, log: Callable[[str], None]) -> NeoXArgs:
    """`args`, or the same run continued from its own `save` folder. Collective: rank 0 looks, all follow.

    A `load` that names the save folder itself is taken as it stands, with its `finetune` and `no_load_optim`.
    """
    if args.save is None or is_own_save(args):
        return args
    box = [dist.get_rank() == 0 and (Path(args.save) / LATEST).is_file()]
    dist.broadcast_object_list(box, src=0, device=device)
    if not box[0]:
        return args
    told = "from_scratch" if args.from_scratch else f"load: {args.load}"
    log(f"{args.save} holds checkpoints of this run: it goes on from the last one ({told} was for its first start)")
    return args.replace(load=args.save, iteration=None, from_scratch=False, finetune=False, no_load_optim=False)
