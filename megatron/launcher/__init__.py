"""From `python deepy.py train.py a.yml b.yml` to a rank that knows its place.

You are here: neox_arguments -> **launcher** -> model -> trainer -> checkpoint. `deepy.py` calls `command_line`, which
checks the configuration and has `start` run one of two small programs: `fork` (CPU ranks forked from one process that
has imported everything) or `torchrun`. A rank's script calls `run(program)`; the program calls
`megatron.parallel.process_groups.initialize(args)`. Nothing here but `fork` and `torchrun` imports torch.
"""

from megatron.launcher.rank_main import run, worker_args

__all__ = ["run", "worker_args"]
