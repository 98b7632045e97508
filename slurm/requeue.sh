# How the jobs of this folder start their ranks and what they do when these end; sourced by bash.
#
# The trainers answer SIGTERM and SIGUSR1 by a checkpoint and exit status 85, on all ranks. That status, and no other,
# requeues the job: 0 is the end, 2 a mistake that another start would repeat, anything else a crash to look at.

requeue_status=85
idle_starts_allowed=3 # starts in a row that add no checkpoint, before the job gives up

# scontrol takes the plain id of an array's last task for the whole array.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

# With a handler, even an empty one, bash outlives a signal until srun has ended, and can still look at the status.
trap : TERM USR1

# start_ranks <output_dir> <accelerate config> <script> <flags>...: one start of the job.
start_ranks() {
  local output_dir=$1 config=$2 status=0 state
  shift 2
  count_idle_starts "$output_dir"
  echo "$(date '+%F %T') job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: $*"

  # --cpus-per-task: srun does not take it over from sbatch by itself.
  srun --kill-on-bad-exit=1 --label --open-mode=append --output="slurm/logs/$SLURM_JOB_NAME-$job-%n-%N.log" \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    python -u slurm/rank.py --config_file "$config" "$@" || status=$?

  echo "$(date '+%F %T') job $job ended with status $status"
  if [ "$status" -ne "$requeue_status" ]; then
    rm -f "$starts"
    exit "$status"
  fi
  # scancel and an elapsed limit bring the ranks to the same status, but then the job is no longer running.
  state=$(squeue --noheader --jobs "$job" --format %T || true)
  if [ -n "$state" ] && [ "$state" != RUNNING ]; then
    echo "not requeued from here: the job is $state (cancelled, at its time limit, or requeued already)"
    exit "$status"
  fi
  echo "requeued: it goes on from its last checkpoint"
  scontrol requeue "$job"
}

# Ends the job where its last starts all met the same checkpoints (or, in an evaluation, the same finished cells).
count_idle_starts() {
  local met
  starts=slurm/logs/$job.starts
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$starts"
  met=$({ ls -d "$1"/checkpoints/* "$1"/records/* 2> /dev/null || true; } | cksum)
  echo "$met" >> "$starts"
  if [ "$(tail -n $((idle_starts_allowed + 1)) "$starts" | grep -cFx "$met")" -gt "$idle_starts_allowed" ]; then
    echo "error: job $job: $idle_starts_allowed starts in a row added nothing to $1; lower --checkpoint_steps or give" \
      "a start more time, then submit again" >&2
    rm -f "$starts"
    exit 1
  fi
}
