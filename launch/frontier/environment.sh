# Sources: FPT is OLCF's PyTorch page (July 2026), HPE its RCCL tuning guide (April 2026). "Contradicted" marks advice
# that changed between ROCm versions: measure with the preflight before you change it.

# The plugin through which RCCL uses Slingshot; a module since July 2026, loaded after rocm (FPT).
module load PrgEnv-gnu/8.7.0 cpe/26.03 rocm/7.1.1 rccl-net-plugin craype-accel-amd-gfx90a
# Without this, the libraries of a cpe other than the default are not found (FPT).
export LD_LIBRARY_PATH="$CRAY_LD_LIBRARY_PATH:$LD_LIBRARY_PATH"

# The ranks meet at the address of the first node (FPT), where rank 0 is.
MASTER_ADDR=$(hostname -i | cut -d' ' -f1)
export MASTER_ADDR

# If the plugin is missing, fail instead of silently falling back to TCP, which is several times slower (FPT, HPE). HPE
# calls the plugin "AWS Libfabric". Only for jobs on several nodes.
if ((SLURM_JOB_NUM_NODES > 1)); then export NCCL_NET=OFI; fi
# Bootstrap traffic on one card: with all four, jobs of more than about 300 nodes did not start (frontier-torchtitan;
# OLCF user docs, issue 947). The data still use all four.
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
# Copy between GCDs by kernels: the copy engines do not reach the links' speed on several pairs (measured on LUMI's
# identical blade; Poro-2's launcher). Not in OLCF's list.
export HSA_ENABLE_SDMA=0
# Seven cores per rank, most of them for the data loader and RCCL's threads.
export OMP_NUM_THREADS=2

# HIP maps streams to this many hardware queues, and work that waits in a queue blocks the work behind it. engine:
# megatron has seven streams (computation, tensor and data parallelism, four links between stages): with the default 4 a
# waiting receive could block computation (torchtitan issue 4032, rocm-systems issue 8916). 8 is OLMo's value; 16 was
# slower on an MI355X. Compare 4 and 8 with benchmarks/engine_gpu.py.
export GPU_MAX_HW_QUEUES=8
# megatron-core's launchers and LumiOpen's 71B run set it, so that a collective launched before a product is not queued
# behind it. HIP does not document it.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# If a collective fails, every rank writes a trace of its last collectives; the first variable has no effect without the
# second (docs.pytorch.org, ProcessGroupNCCL environment variables).
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_NCCL_TRACE_BUFFER_SIZE=2000
# A stall of the file system freezes the ranks for longer than the default of this monitor, which then kills a healthy
# job.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800
