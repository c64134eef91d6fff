"""A process as one of the ranks: environment, devices, CPUs, process groups, errors raised on all ranks together."""
