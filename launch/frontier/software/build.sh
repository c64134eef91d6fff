#!/bin/bash -l
# Builds the environment that a job unpacks on every node: software/neox-llama.tar.gz in the folder where this runs.
#
#     cd PROJECT && bash CHECKOUT/launch/frontier/software/build.sh
#
# Run it on a login node, from a folder on Orion; it takes some 20 minutes. Not built at the site yet: it follows OLCF's
# PyTorch page of July 2026 (FPT); shellcheck has checked it, and pip its pins, elsewhere.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
recipe=$checkout/launch/frontier/software
target=$PWD/software
prefix=$target/environment

# The job's modules (../environment.sh), so that the kernels are built against the libraries that they run with, and
# miniforge for conda (FPT).
module load PrgEnv-gnu/8.7.0 cpe/26.03 rocm/7.1.1 craype-accel-amd-gfx90a miniforge3

mkdir -p "$target"
conda create --yes --prefix "$prefix" --channel conda-forge --override-channels python=3.11 conda-pack pigz
python=$prefix/bin/python
# torch first, from PyTorch's own index for ROCm 7.1 (FPT). The constraints keep later packages from replacing it.
"$python" -m pip install --no-cache-dir --index-url https://download.pytorch.org/whl/rocm7.1 torch==2.10.0
grep -v '^torch==' "$checkout/constraints.txt" | cat - "$recipe/torch.txt" > "$target/constraints.txt"
"$python" -m pip install --no-cache-dir --constraint "$target/constraints.txt" --requirement "$checkout/requirements.txt"

# The kernels, into the checkout: a job copies its code to the nodes with them.
(cd "$checkout" && NEOX_GPU_ARCHS=gfx90a "$python" setup.py build_ext --inplace)

# Check that torch is the version that was asked for.
"$python" - <<'PYTHON'
import torch

assert torch.__version__.startswith("2.10.0") and torch.version.hip, f"torch {torch.__version__} is not ROCm's 2.10.0"
PYTHON
"$prefix/bin/conda-pack" --prefix "$prefix" --output "$target/neox-llama.tar.gz" --n-threads 8 --force
echo "wrote $target/neox-llama.tar.gz"
