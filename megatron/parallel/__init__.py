"""A process among the ranks: environment, devices, CPUs, process groups, errors raised on all ranks together."""
