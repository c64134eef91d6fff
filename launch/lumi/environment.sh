# Sources: LUG is LUMI's user guide, LAG the LUMI AI guide, HPE its RCCL tuning guide (April 2026). "Contradicted" marks
# advice that changed between ROCm versions: measure with the preflight before you change it.

# Binds the host's Slingshot libraries and file systems into the container; the RCCL plugin is in the container (LAG).
module use /appl/local/containers/ai-modules
module load singularity-AI-bindings

# If the plugin is missing, fail instead of silently falling back to TCP, which was about 13 times slower for MPI. The
# name is HPE's; containers whose plugin calls itself OFI need that name. Only for jobs on several nodes.
if ((SLURM_JOB_NUM_NODES > 1)); then export NCCL_NET="AWS Libfabric"; fi
# Traffic of all four network cards (LUG, LAG).
export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3 GLOO_SOCKET_IFNAME=hsn0
# Contradicted: GPU-direct RDMA. LUG and HPE say PHB. With ROCm 7.0 containers PHB and SYS hung on several nodes and
# unset worked (laifs-container-recipes, issues 28 and 30): delete this line for those.
export NCCL_NET_GDR_LEVEL=PHB
# NCCL_NCHANNELS_PER_PEER stays unset: 32 is quoted as faster and gave unstable gradients with pipeline parallelism on
# LUMI (Poro-2's launcher, April 2025).

# How libfabric watches memory; never memhooks, which deadlocks (HPE).
export FI_MR_CACHE_MONITOR=userfaultfd
# Room for the events of thousands of peers; LumiOpen's 71B run used this much (Megatron-LM-lumi).
export FI_CXI_DEFAULT_CQ_SIZE=262144

# Copy between GCDs by kernels: the copy engines do not reach the links' speed on several pairs (Poro-2's launcher,
# measured on LUMI with OSU's benchmarks).
export HSA_ENABLE_SDMA=0 HSA_FORCE_FINE_GRAIN_PCIE=1
# LumiOpen and TildeOpen trained with one thread per rank.
export OMP_NUM_THREADS=1

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
