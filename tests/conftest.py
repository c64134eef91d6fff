"""Settings of every test process, made before torch is imported."""

import os

# Two OpenMP threads that spin while a third process wants a core were eight times slower than two that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
