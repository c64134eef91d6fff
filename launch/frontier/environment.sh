# Sources: FPT is OLCF's PyTorch page (July 2026), HPE its RCCL tuning guide (April 2026). "Contradicted" marks advice
# that changed between ROCm versions: measure with the preflight before you change it.

# The plugin that takes RCCL to Slingshot; it exists as a module since July 2026 and comes after rocm (FPT).
module load PrgEnv-gnu/8.7.0 cpe/26.03 rocm/7.1.1 rccl-net-plugin craype-accel-amd-gfx90a
# The libraries of a cpe that is not the default one are found only so (FPT).
export LD_LIBRARY_PATH="$CRAY_LD_LIBRARY_PATH:$LD_LIBRARY_PATH"

# The ranks meet at the address of the first node (FPT), where rank 0 is.
MASTER_ADDR=$(hostname -i | cut -d' ' -f1)
export MASTER_ADDR

# Fail instead of falling to TCP without a word when the plugin is missing; several times slower (FPT, HPE). HPE's name
# for the same is "AWS Libfabric". For jobs on several nodes only.
if ((SLURM_JOB_NUM_NODES > 1)); then export NCCL_NET=OFI; fi
# Bootstrap traffic on one card: with all four, jobs of more than about 300 nodes did not start (frontier-torchtitan;
# OLCF user docs, issue 947). The data use all four all the same.
export NCCL_SOCKET_IFNAME=hsn0 GLOO_SOCKET_IFNAME=hsn0
# Contradicted: GPU-direct RDMA. OLCF, LUMI and HPE say PHB. Twice as fast, but unstable beyond 128 to 256 nodes for
# Huginn (arXiv 2502.05171) and hanging with the ROCm 7.0 container of LUMI until unset (laifs-container-recipes, issue
# 30).
export NCCL_NET_GDR_LEVEL=PHB
# Rings may use another card at the other end (FPT, HPE).
export NCCL_CROSS_NIC=1
# NCCL_NCHANNELS_PER_PEER stays unset: 32 is quoted as faster and gave unstable gradients with pipeline parallelism
# (Poro-2's launcher, April 2025).

# How libfabric watches memory: kdreg2 is the default since May 2025; never memhooks, which deadlocks (FPT, HPE).
export FI_MR_CACHE_MONITOR=kdreg2
# No registration of host memory (FPT).
export FI_CXI_DISABLE_HOST_REGISTER=1
# Room for the events of thousands of peers: "Cassini Event Queue overflow" otherwise (FPT, OLMo).
export FI_CXI_DEFAULT_CQ_SIZE=131072
export FI_CXI_DEFAULT_TX_SIZE=2048
# Rendezvous by the receiver's reads; with --network=disable_rdzv_get above (FPT, HPE: better at scale).
export FI_CXI_RDZV_PROTO=alt_read
export FI_CXI_RDZV_EAGER_SIZE=0 FI_CXI_RDZV_THRESHOLD=0 FI_CXI_RDZV_GET_MIN=0
# Match in software when the card's list is full (FPT, HPE).
export FI_CXI_RX_MATCH_MODE=hybrid

# Fine-grained memory over PCIe, for kernels that signal the card (FPT).
export HSA_FORCE_FINE_GRAIN_PCIE=1
# Copies between GCDs by kernels: the copy engines reach the links' speed on several pairs only so (measured on LUMI's
# same blade; Poro-2's launcher). Not in OLCF's list.
export HSA_ENABLE_SDMA=0
# Seven cores to a rank, most of them for the data loader and RCCL's threads.
export OMP_NUM_THREADS=2

# HIP maps streams on this many hardware queues, and what waits in a queue holds up what is behind it. engine: megatron
# has seven streams (computation, tensor and data parallelism, four links between stages): with the default of 4 a receive
# that waits could hold up computation (torchtitan issue 4032, rocm-systems issue 8916). 8 is OLMo's value; 16 was slower
# on an MI355X. Compare 4 and 8 by benchmarks/engine_gpu.py.
export GPU_MAX_HW_QUEUES=8
# megatron-core's launchers set it, LumiOpen's 71B run too, so that a collective launched before a product is not queued
# behind it. HIP does not document it.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# A rank whose collective fails leaves a trace of the last ones of every rank; the first has no effect without the
# second (docs.pytorch.org, ProcessGroupNCCL environment variables).
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_NCCL_TRACE_BUFFER_SIZE=2000
# A stall of the file system freezes the ranks for longer than the default of this monitor, which then kills a healthy
# job.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800
