"""An MI250X node, as shown in OLCF's Frontier user guide."""

NUMA_OF_GCD = {0: 3, 1: 3, 2: 1, 3: 1, 4: 0, 5: 0, 6: 2, 7: 2}
