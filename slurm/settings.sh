# What all jobs of this folder and prefetch.sh share. Edit it once; sourced by bash in the repository's root.

# 1. Whatever makes `python` the one with torch, here and on the compute nodes: modules, conda, a virtual environment.
# module load cuda
source .venv/bin/activate

# 2. What is trained on what. Flags after the script's name on the command line win over these.
trainer=train_lore.py
arguments=(
  --model_name_or_path openai/clip-vit-large-patch14
  --train_shards "data/imagenet/train-{000000..001281}.tar"
  --eps 4 --rho 0.1 --checkpoint_steps 500
)

# 3. Where indexes of shards, and the shards behind URLs, are kept: on the node's own disk.
# Nodes without internet and shards behind URLs: a shared directory instead, for prefetch.sh to fill and for the jobs
# to read, as in CACHE_DIR=$SCRATCH/shards sbatch ...
cache_dir=${CACHE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/robust-clip-$(id -un)}

# 4. Models come from the hub's cache, which prefetch.sh fills, and nothing asks the hub: compute nodes often have no
# internet, and hundreds of processes that ask at once are turned away. HF_HOME (default ~/.cache/huggingface) must be
# on a file system that all nodes see.
export HF_HUB_OFFLINE=1
