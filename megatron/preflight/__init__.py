"""Before a job costs node-hours: do all ranks start, do all groups work, is every node as fast as the others?

`python -m megatron.preflight CONFIG ...` runs on all ranks, as a job step of its own (docs/preflight.md). `phases` runs
the phases; `phase_store` detects ranks that do not arrive or do not finish, and `diagnosis` names them; `groups` forms
the training's groups and sums over each; `run_screens` measures devices and links, `compare` finds the slow ones;
`transport` reads RCCL's log about the network.
"""
