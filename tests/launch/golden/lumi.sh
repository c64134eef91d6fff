#!/bin/bash -l
#SBATCH --job-name=neox-llama
#SBATCH --account=project_465000001
#SBATCH --partition=standard-g
#SBATCH --nodes=256
#SBATCH --time=48:00:00
#SBATCH --chdir=/project/project_465000001/neox-llama
#SBATCH --output=neox-%j.log
# no neighbors on the node's network cards
#SBATCH --exclusive
# all memory of the node: /tmp is in it (LUG)
#SBATCH --mem=0
# all GCDs, visible to every rank: see the srun line (LUG)
#SBATCH --gpus-per-node=8
# the batch shell is warned before the time limit, and passes the warning on
#SBATCH --signal=B:USR1@600
# after the loss of a node Slurm starts the job again and appends to its log. Not --no-kill: if the batch
# shell's node is lost, the others would stay allocated and idle until the time limit
#SBATCH --requeue
#SBATCH --open-mode=append
# never two jobs of this name at once: they would save into the same folder
#SBATCH --dependency=singleton

# LUMI-G (CSC), ranks: 2048, nodes: 256; rendered by launch/render.py; docs/launching.md explains it. To change
# something, render again.
#
# Exit codes: 0 the training is done; 2 an error that would recur in the same job (configuration, software, preflight);
# 75 the job is back in the queue; 143 Slurm has ended it; others are the ranks' own.

# shellcheck disable=SC2016 # values stand in single quotes so that nothing in them is expanded
# shellcheck disable=SC2317 # srun gets functions by name, through declare -f
set -Eeuo pipefail
trap 'echo "launch: stopped: line $LINENO of the batch script failed, see above" >&2' ERR

# --- what was asked for

directory=/project/project_465000001/neox-llama
project=/project/project_465000001/neox-llama
configuration=(
    configs/llama31_70b/model.yml
    configs/llama31_70b/cpt.yml
    configs/llama31_70b/lumi.yml
)
save=checkpoints/cpt # from the configuration; relative to the directory
signal_seconds=600
max_fruitless=2 # restarts in a row without a new save

# --- signals, and the end

say() { echo "launch: $*"; }

# stop CODE WHY...: the last lines of the log say why the job has ended.
stop() {
    if [[ -n $cancelled ]]; then set -- 143 "ended by Slurm; last save: $(last_save)${why:+; $why}"; fi
    say "stopped: ${*:2}"
    exit "$1"
}

last_save() { if [[ -n $save && -r $save/latest ]]; then cat "$save/latest"; else echo none; fi; }

step='' step_since=0 warned='' cancelled='' why=''

# No srun may outlive this script: a requeued job numbers its steps from 0 again, so that a leftover srun would end a
# step of the next start. Linux kills srun at the moment this shell ends, even by SIGKILL; srun's helper process then
# ends the ranks.
tied=()
if setpriv --pdeathsig=KILL true 2>/dev/null; then tied=(setpriv --pdeathsig=KILL); fi

# If this script ends while the ranks run, srun gets five seconds to end them in order.
end_step() {
    trap '' TERM
    if [[ -z $step ]] || ! kill -TERM "$step" 2>/dev/null; then return 0; fi
    for _ in {1..50}; do
        if ! kill -0 "$step" 2>/dev/null; then return 0; fi
        sleep 0.1
    done
    kill -KILL "$step" 2>/dev/null || true
}
trap end_step EXIT

# Slurm warns only the batch shell (--signal=B:). srun passes the warning on to all ranks; it is repeated, because srun
# may still be starting them. It would kill a rank in the milliseconds before the rank blocks it, and ranks start one
# after the other: the first warning waits until srun is a twentieth of the time old. No TERM while they save: srun would
# kill them. Ranks that still run after three quarters of the time will not save any more; the job then continues from
# the previous save.
remind() {
    local since=$SECONDS
    until [[ $(cat "/proc/$step/comm" 2>/dev/null || echo srun) == srun ]]; do sleep 0.1; done # before, USR1 would kill bash
    while ((SECONDS - step_since < signal_seconds / 20)); do sleep 0.5; done
    while kill -USR1 "$step" 2>/dev/null; do
        sleep "$((signal_seconds < 40 ? (signal_seconds + 3) / 4 : 10))"
        if ((SECONDS - since > signal_seconds * 3 / 4)); then
            say "the ranks did not save within $((SECONDS - since)) s of the warning: they are killed"
            kill -TERM "$step" 2>/dev/null
            break
        fi
    done
}
warn() {
    say "warning: the time limit is $signal_seconds s away"
    warned=1
    if [[ -n $step ]]; then remind & fi
}
trap warn USR1
# scancel reaches the ranks, too: they save if Slurm's KillWait leaves them the time.
trap 'cancelled=1; say "Slurm ends the job: scancel, preemption or a failed node"' TERM

# --- environment: launch/lumi/environment.sh

# Variables that another launcher may have set in the shell that called sbatch; here srun numbers the ranks.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
set +u # modules read variables that are not set
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

# What deepy.py sets for the ranks that it starts.
# megatron-core: tensor-parallel all-reduces start before the next matrix product.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTHONWARNINGS='ignore:Transformer Engine and Apex are not installed,ignore:`torch.distributed.all_gather_into_tensor` is deprecated,ignore:`torch.distributed.reduce_scatter_tensor` is deprecated'
set -u

# --- on every node

# This node's folder for the job. The node's name keeps nodes apart where the "local" disk is a shared one.
here() { printf '%s' "/tmp/$USER/neox-$SLURM_JOB_ID/$SLURMD_NODENAME"; }

# run_here PROGRAM.py|-m [ARGUMENT...]: Python with the project's code, on this node. Whatever is read or written often
# is on the node's own disk: imports of thousands of ranks stall a parallel file system, and caches there race and lose
# their locks (MIOpen's are sqlite files).
run_here() {
    local here
    here=$(here)
    export PYTHONPATH="$here/code"
    if [[ $1 == *.py ]]; then set -- "$here/code/$1" "${@:2}"; fi
    export NEOX_CACHE="$here/cache/neox" TORCH_EXTENSIONS_DIR="$here/cache/torch_extensions"
    export MIOPEN_USER_DB_PATH="$here/cache/miopen" MIOPEN_CUSTOM_CACHE_DIR="$here/cache/miopen"
    # Triton and inductor rename files into place, but each rank its own: every rank has a folder.
    export TRITON_CACHE_DIR="$here/cache/triton-${SLURM_LOCALID:-0}"
    export TORCHINDUCTOR_CACHE_DIR="$here/cache/inductor-${SLURM_LOCALID:-0}"
    # Nothing here is compiled: without torch's compiler, which megatron-core would load, imports cost a third less.
    export TORCHDYNAMO_DISABLE="${TORCHDYNAMO_DISABLE:-1}"
    exec singularity exec --bind "$here" --bind /project/project_465000001/neox-llama \
        software/neox-llama.sif bash -c 'eval "${WITH_CONDA:-}"; exec "$0" -u "$@"' python "$@"
}

# Only this user may enter the folder: names in /tmp can be guessed, and an existing one may be somebody else's.
make_folders() {
    local top="/tmp/$USER/neox-$SLURM_JOB_ID"
    umask 077
    mkdir -p "$top"
    if [[ ! -O $top || -L $top ]] || ! chmod 700 "$top"; then
        echo "launch: $SLURMD_NODENAME: $top belongs to somebody else" >&2
        exit 1
    fi
    rm -rf "$(here)"
    mkdir -p "$(here)"/{cache/{neox,miopen,torch_extensions},code,software}
}

# unpack FOLDER ARCHIVE CHECKSUM: once per node, after verifying the archive that has arrived.
unpack() {
    local found
    found=$(sha256sum <"$2") || exit 1
    if [[ ${found%% *} != "$3" ]]; then
        echo "launch: $SLURMD_NODENAME: $2 has checksum ${found%% *}, expected $3" >&2
        exit 1
    fi
    tar -xf "$2" -C "$(here)/$1" || { echo "launch: $SLURMD_NODENAME: $2 cannot be unpacked" >&2; exit 1; }
    # An environment packed by conda-pack contains its original paths until its own Python runs this.
    local bin
    bin="$(here)/$1/bin"
    if [[ -x $bin/conda-unpack ]]; then PATH="$bin:$PATH" "$bin/conda-unpack" || exit 1; fi
}

remove_folders() {
    rm -rf "$(here)"
    rmdir "/tmp/$USER/neox-$SLURM_JOB_ID" 2>/dev/null || true # other nodes' folders are in it where the disk is shared
}

answer() { :; }

# --- on the batch node

# on_every_node MINUTES FUNCTION [ARGUMENT...]
on_every_node() {
    local minutes=$1 name=$2
    shift 2
    "${tied[@]}" \
        srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --time="$minutes" \
        --kill-on-bad-exit=1 --export=ALL \
        bash -c "$(declare -f here "$name"); $name \"\$@\"" "$name" "$@"
}

# Nodes of a list that Slurm has taken out of service, with its reason.
lost_nodes() {
    sinfo --noheader --Node --nodes="$1" --format='%N is %T (%E)' 2>/dev/null |
        grep -E ' is (down|fail|drain|unknown|powering|power|reboot|[a-z]+\*)' | sort -u || true
}

# broken WHY: a step before the training failed. If all nodes answer, it would fail again. If one does not, the job goes
# back to the queue for others.
broken() {
    if [[ -z $cancelled ]] && ! on_every_node 2 answer; then again 1 "$1 and a node does not answer"; fi
    stop 2 "$1"
}

# again CODE WHY: requeue the job, unless too many restarts in a row have saved nothing.
again() {
    if [[ -n $cancelled ]]; then stop 143; fi
    lost_nodes "$SLURM_JOB_NODELIST" | sed 's/^/launch: node failure: /'
    if [[ $(last_save) == "$before" ]] && ((fruitless >= max_fruitless)); then
        stop "$1" "$2; not requeued: $((fruitless + 1)) starts in a row without a new save"
    fi
    say "requeued: $2; last save: $(last_save)"
    trap '' TERM # requeueing ends this script
    touch "$run/ended"
    scontrol requeue "$SLURM_JOB_ID" || stop "$1" "Slurm refused to requeue; submit the same script again"
    avoid
    exit 75
}

# Nodes that the preflight found slow (one --exclude line) or on which ranks were lost (one name a line) are not used by
# the next start. A job's nodes can be changed only while it is pending, which it is a moment after it was requeued.
avoid() {
    local nodes now
    nodes=$({ cat "$run/exclude" "$run/lost-nodes" 2>/dev/null || true; } | sed 's/^--exclude=//' | paste -sd,)
    if [[ -z $nodes ]]; then return; fi
    now=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -oP ' ExcNodeList=\K[^( ]\S*' || true)
    for _ in {1..20}; do
        if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${now:+$now,}$nodes"; then
            say "the next start avoids $nodes"
            return
        fi
        sleep 1
    done 2>/dev/null
    say "the next start should avoid $nodes: scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$nodes"
}

# stage FOLDER ARCHIVE: unpack it on every node's disk, as HERE/FOLDER. sbcast can fail and leave a truncated file.
stage() {
    local sum target
    sum=$(sha256sum <"$2") || stop 2 "$2 cannot be read"
    target="/tmp/$USER/neox-$SLURM_JOB_ID/$1.tar"
    sbcast --preserve --force "$2" "$target" || broken "sbcast of $2 to $target failed, see above"
    on_every_node 15 unpack "$1" "$target" "${sum%% *}" || broken "$2 did not arrive whole on every node, see above"
    on_every_node 5 rm_staged "$target" || true
}

rm_staged() { rm -f "$1"; }

# A requeued job numbers its steps from 0 again, and slurmctld repeats a signal that a node did not confirm a minute or
# more later: a signal for the previous start's ranks would end this start's. Empty steps move the ranks' step to a
# number that no recent start used for its ranks.
skip_step_numbers() {
    local left=$((${SLURM_RESTART_COUNT:-0} % 16))
    for (( ; left > 0; left--)); do
        "${tied[@]}" srun --nodes=1 --ntasks=1 --time=1 --export=ALL true || true
    done
}

# all_ranks MINUTES PROGRAM [ARGUMENT...]: one srun, ranks numbered node by node. 0 minutes: as long as the job.
# Variables that differ between ranks (SLURM_PROCID, ...) are read in the rank; here they would be the batch shell's.
# Slurm's warning would kill a starting srun, and a starting rank: it stays pending until either handles it.
all_ranks() {
    local minutes=$1
    shift
    exec env --block-signal=USR1 "${tied[@]}" \
        srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * 8))" \
        --ntasks-per-node=8 --distribution=block \
        --cpus-per-task=7 \
        --gpus-per-node=8 \
        --cpu-bind=mask_cpu:0xfe000000000000,0xfe00000000000000,0xfe0000,0xfe000000,0xfe,0xfe00,0xfe00000000,0xfe0000000000 \
        --time="$minutes" --kill-on-bad-exit=1 --export=ALL \
        env --block-signal=USR1 bash -c "$(declare -f here run_here); run_here \"\$@\"" rank "$@"
}

# --- start or restart

cd "$directory"
run="$directory/runs/$SLURM_JOB_ID"
mkdir -p "$run"
forget() { rm -f "$run"/failed "$run"/why "$run"/said-* "$run"/lost-nodes "$run"/exclude; }
forget # files of the previous start: a requeued job keeps its number
export NEOX_RUN_FOLDER="$run"
# Known only to the ranks of this start: it seals what they write to the preflight's store.
NEOX_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export NEOX_SECRET

# `sbatch --nodes=N job.sh`, for instance when nodes are missing, continues from the last save with the same ranks per
# node and global batch, and another data-parallel size.
configuration+=(--num_nodes "$SLURM_JOB_NUM_NODES")
if ((SLURM_JOB_NUM_NODES != 256)); then say "nodes: $SLURM_JOB_NUM_NODES, rendered for 256"; fi

before=$(last_save) fruitless=0
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST; last save: $before"
if [[ -f $run/start ]]; then
    { read -r last_before && read -r fruitless && read -r last_nodes; } <"$run/start"
    if [[ $before == "$last_before" ]]; then fruitless=$((fruitless + 1)); else fruitless=0; fi
    if [[ ! -f $run/ended ]]; then say "the start before was ended from outside, on $last_nodes"; fi
    lost_nodes "$last_nodes" | sed 's/^/launch: node failure: /'
    if ((fruitless > max_fruitless)); then stop 1 "$fruitless restarts without a new save; the log above says why"; fi
fi
printf '%s\n' "$before" "$fruitless" "$SLURM_JOB_NODELIST" >"$run/start"
rm -f "$run/ended"

# --- software

on_every_node 5 make_folders || broken "the folders for this job cannot be made, see above"
if [[ ! -f $run/code.tar ]]; then # every start runs the first start's code, even if the checkout changes
    tar -C "$project" --exclude=__pycache__ -cf "$run/code.tar.part" deepy.py train.py eval.py generate.py megatron csrc
    mv "$run/code.tar.part" "$run/code.tar"
fi
stage code "$run/code.tar"

# --- checks before anything is trained

# Does every stage fit in memory? The plan is in the log.
(run_here deepy.py "$(here)/code/train.py" "${configuration[@]}" --dry-run --machine lumi) ||
    stop 2 "the plan cannot be right, see above"

# Every group of ranks must communicate within a time limit, every node is measured, RCCL's transport is checked.
checked=0
(all_ranks 15 -m megatron.preflight "${configuration[@]}" --exclude-file "$run/exclude") || checked=$?
case $checked in
    0) ;;
    3) again 1 "the preflight: ranks or groups failed, see above" ;;
    4) again 1 "the preflight: slow nodes, see above" ;;
    *) stop 2 "the preflight failed with code $checked, see above" ;;
esac

# --- the training

if [[ -n $cancelled ]]; then stop 143; fi
forget # files of the checks
skip_step_numbers
NEOX_STARTED=$(date +%s)
export NEOX_STARTED
exec 9> >(trap '' TERM && exec tee "$run/srun.err" >&2) # scancel must not cut off the ranks' last messages
tee=$!
all_ranks 0 train.py "${configuration[@]}" 2>&9 9>&- &
step=$! step_since=$SECONDS
exec 9>&-
if [[ -n $warned ]]; then remind & fi
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
status=0
wait "$step" || status=$?
step=''
wait "$tee" || true

# --- how it ended

# The rank that failed first has written its exit code and reason; about a killed rank srun knows more.
if [[ -f $run/failed ]]; then status=$(<"$run/failed"); fi
why=$(cat "$run/why" 2>/dev/null || true)
first=$(grep -m1 -E '^srun: error: ([^:]+: tasks? |Node failure)' "$run/srun.err" | sed 's/^srun: error: //' || true)
if [[ -n $cancelled ]]; then stop 143; fi
touch "$run/ended" # so that the next start can tell whether Slurm let this one end
case $status in 0 | 2 | 75) on_every_node 1 remove_folders >/dev/null 2>&1 || true ;; esac # else a node may be gone
if ((status == 0)); then
    say "done; last save: $(last_save)"
    exit 0
fi
if ((status != 75)); then say "failed with code $status${first:+; first to end: $first}"; fi
if ((status == 2)); then stop 2 "$why"; fi
if [[ -z $save ]]; then stop "$status" "${why:-see above}; there is no save folder to go on from"; fi
again "$status" "${why:-${first:-see above}}"
