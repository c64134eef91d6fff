"""From `python deepy.py train.py a.yml b.yml` to running ranks.

`command_line` checks the configuration and starts the ranks: on one machine through `local`, which runs `fork` (CPU
ranks forked from one process that has imported everything) or `torchrun`; in a Slurm allocation through `slurm`, by one
srun. A rank's script calls `rank_main.run(program)`; the program calls `megatron.parallel.process_groups.initialize`.
Only `fork` and `torchrun` import torch.
"""
