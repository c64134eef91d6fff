"""Setup of a process as a rank: environment, devices, CPUs, process groups, errors raised on all ranks together."""
