#!/bin/bash
# Tries on this cluster what docs/slurm.md describes: one small run on two nodes, undisturbed, and the same run with a
# signal and a requeue in the middle. Ends with status 0 only if the second one was interrupted and gave the same weights.
# CPUs suffice; no download. From the repository's root, on a node that may submit jobs:
#   slurm/try_requeue.sh [sbatch's own options, such as --partition=debug --account=me]
set -euo pipefail
for command in sbatch squeue scancel scontrol sinfo; do
  command -v "$command" > /dev/null || { echo "error: $command: not found; this needs a node with SLURM's commands" >&2; exit 2; }
done
[ -e slurm/settings.sh ] || { echo "error: slurm/settings.sh: not here; start this in the repository's root" >&2; exit 2; }
source slurm/settings.sh

patience=${PATIENCE:-1800} # seconds that each job may wait and run
max_steps=120
signal_step=30
mkdir -p runs
work=$(mktemp -d runs/try_requeue.XXXX)
jobs=()

say() { echo "$(date '+%T') $*"; }
fail() { say "error: $*; see $work and slurm/logs/try-requeue-*" >&2; exit 1; }
cancel() { [ ${#jobs[@]} -eq 0 ] || scancel --quiet "${jobs[@]}" 2> /dev/null || true; }
trap cancel EXIT
trap 'exit 130' INT TERM

# Virtual nodes of one machine (several slurmd -N) have names without an address.
if [ "$(scontrol show nodes --oneliner | grep -o 'NodeHostName=[^ ]*' | sort -u | wc -l)" -eq 1 ]; then
  export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
fi
export ACCELERATE_CONFIG=accelerate_configs/cpu_2proc.yaml OMP_NUM_THREADS=1 CACHE_DIR=$work/cache

submit() { # submit <output_dir>: prints the job's id
  sbatch --parsable --job-name=try-requeue --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 --mem=3000M \
    --time=20 --signal=USR1@60 "${options[@]}" slurm/train_multi_node.sbatch \
    --model_name_or_path "$work/clip" --train_shards "$work/digits/train" --num_workers 1 --eps 16 --rho 0.1 \
    --max_steps $max_steps --per_device_train_batch_size 16 --learning_rate 3e-4 --checkpoint_steps 1000 \
    --logging_steps 5 --report_to none --output_dir "$1" | cut -d';' -f1
}

# state <job>, restarts <job>: what SLURM knows of it, also for some minutes after its end.
state() { squeue --noheader --states=all --jobs "$1" --format=%T 2> /dev/null || true; }
restarts() { scontrol show job "$1" 2> /dev/null | grep -o 'Restarts=[0-9]*' | cut -d= -f2 || true; }
last_step() { grep -o '"step": [0-9]*' "$1/metrics.jsonl" 2> /dev/null | tail -n 1 | cut -d' ' -f2 || true; }

# wait_until <seconds> <what> <command>...: polls the command; stops the script where the job has failed or time is up.
wait_until() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    case $(state "$job") in
      FAILED | CANCELLED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY | BOOT_FAIL | DEADLINE)
        tail -n 20 slurm/logs/try-requeue-"$job"*.log >&2
        fail "job $job is $(state "$job") while waiting until $what" ;;
    esac
    [ $SECONDS -lt $deadline ] || fail "job $job is $(state "$job") after $patience s of waiting until $what"
    sleep 1
  done
}
is_completed() { [ "$(state "$job")" = COMPLETED ]; }
is_at_signal_step() { local step; step=$(last_step "$1"); [ "${step:-0}" -ge $signal_step ] || is_completed; }
is_requeued() { [ "$(restarts "$job")" = 1 ] && [ "$(state "$job")" != COMPLETING ] || is_completed; }

options=("$@")
say "digits and a small CLIP in $work"
python examples/make_digit_shards.py --output_dir "$work/digits" > "$work/prepare.log" 2>&1 || fail "no digits: $(tail -n 1 "$work/prepare.log")"
python examples/pretrain_small_clip.py --train_data "$work/digits" --output_dir "$work/clip" --hidden_size 32 --num_layers 2 \
  --num_heads 2 --text_hidden_size 32 --text_num_layers 1 --text_num_heads 2 --projection_dim 32 --flip false --crop_padding 2 \
  --batch_size 32 --epochs 1 >> "$work/prepare.log" 2>&1 || fail "no CLIP: $(tail -n 1 "$work/prepare.log")"

job=$(submit "$work/undisturbed")
jobs+=("$job")
say "job $job: $max_steps steps on two nodes, undisturbed"
wait_until "$patience" "it is COMPLETED" is_completed
say "job $job is COMPLETED, restarts: $(restarts "$job")"

job=$(submit "$work/requeued")
jobs+=("$job")
say "job $job: the same, to be interrupted after step $signal_step"
wait_until "$patience" "step $signal_step is logged" is_at_signal_step "$work/requeued"
say "job $job has logged step $(last_step "$work/requeued"); SIGUSR1 to its ranks"
scancel --signal=USR1 "$job" || true # fails where the job has just ended, which is told below
wait_until 120 "it is requeued" is_requeued
say "job $job is $(state "$job"), restarts: $(restarts "$job"), checkpoints: $(ls "$work/requeued/checkpoints" 2> /dev/null | xargs)"
# A requeued job rests for two minutes otherwise. At once would be too soon: its nodes refuse the same job within a second.
sleep 10
scontrol update JobId="$job" StartTime=now 2> /dev/null || true
wait_until "$patience" "it is COMPLETED" is_completed
say "job $job is COMPLETED, restarts: $(restarts "$job")"
[ "$(restarts "$job")" = 1 ] || fail "job $job was not interrupted: it had ended before the signal"

python - "$work/undisturbed" "$work/requeued" << 'PYTHON' || fail "the two runs differ"
import sys
from safetensors.torch import load_file

first, second = (load_file(f"{run}/model.safetensors") for run in sys.argv[1:])
assert first.keys() == second.keys(), f"other tensors: {sorted(first.keys() ^ second.keys())}"
largest = max((first[name].double() - second[name].double()).abs().max().item() for name in first)
print(f"{len(first)} tensors, largest difference of a weight: {largest:g}")
sys.exit(largest > 1e-6)
PYTHON
say "the requeued run is the undisturbed run"
