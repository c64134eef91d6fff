"""Before a job costs node-hours: do all ranks come, do all groups work, is every node as fast as the others?

`python -m megatron.preflight CONFIG ...` on all ranks, as a job step of its own (docs/preflight.md).
`command_line` goes from phase to phase; `board` notices what does not come or does not end, and `verdict` names it;
`groups` forms the training's groups and sums over each; `screens` measures; `transport` reads what RCCL says of the
network.
"""
