"""Who this process is among the ranks: environment, devices and CPUs, process groups, errors raised on all ranks together."""
