# What all jobs of this folder and prefetch.sh share. Edit it once; sourced by bash in the repository's root.

# 1. Whatever makes `python` the one with torch, here and on the compute nodes: modules, conda, a virtual environment.
# module load cuda
source .venv/bin/activate

# 2. What is trained on what. Flags after the script's name on the command line win over these; a recipe there
# (--config recipes/...) replaces them all, see the end of this file.
trainer=train_lore.py
arguments=(
  --model_name_or_path openai/clip-vit-large-patch14
  --train_shards "data/imagenet/train-{000000..001281}.tar"
  --eps 4 --rho 0.1 --checkpoint_steps 500
)
default_output_dir=runs/lore4

# 3. Where indexes of shards, and the shards behind URLs, are kept: on the node's own disk.
# Nodes without internet and shards behind URLs: a shared directory instead, for prefetch.sh to fill and for the jobs
# to read, as in CACHE_DIR=$SCRATCH/shards sbatch ...
cache_dir=${CACHE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/robust-clip-$(id -un)}

# 4. Models come from the hub's cache, which prefetch.sh fills, and nothing asks the hub: compute nodes often have no
# internet, and hundreds of processes that ask at once are turned away. HF_HOME (default ~/.cache/huggingface) must be
# on a file system that all nodes see.
export HF_HUB_OFFLINE=1

# last_value <flag> <default> <flags>...: the value that the script will see.
last_value() {
  local flag=$1 value=$2
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      "$flag") value=${2:-} ;;
      "$flag="*) value=${1#*=} ;;
    esac
    shift
  done
  echo "$value"
}

# add_flags <flags>...: adds them to `merged`. A flag that is there already is replaced with all its values: the scripts
# would join the values of one that takes many.
merged=()
add_flags() {
  local word named=" " kept=() keep=1
  for word in "$@"; do
    case $word in --*) named+="${word%%=*} " ;; esac
  done
  for word in "${merged[@]}"; do
    case $word in --*) case $named in *" ${word%%=*} "*) keep= ;; *) keep=1 ;; esac ;; esac
    [ -z "$keep" ] || kept+=("$word")
  done
  merged=("${kept[@]}" "$@")
}

# 5. A recipe of the command line says what is trained on what, so nothing of 2. may win over it. The trainer is the one
# that its first line names, as in "# train_po.py: DPO ...".
recipe=$(last_value --config "" "$@")
if [ -n "$recipe" ]; then
  [ -r "$recipe" ] || { echo "error: --config $recipe: cannot be read; expected a recipe as in recipes/" >&2; exit 2; }
  named=$(sed -nE '1s/^# (train_[a-z]+\.py):.*/\1/p' "$recipe")
  trainer=${named:-$trainer}
  arguments=()
  default_output_dir=$(sed -nE "s/^output_dir: *[\"']?([^\"'#]*[^\"'# ]).*/\1/p" "$recipe")
  default_output_dir=${default_output_dir:-runs/$(basename "${recipe%.*}")}
fi
