#!/bin/bash
# Brings models and the shards behind URLs to the caches: on a login node, before jobs whose nodes have no internet.
# From the repository's root, with the flags of the job (and the script, where it is not the trainer of settings.sh):
#   slurm/prefetch.sh --rho 0.05
#   slurm/prefetch.sh --config recipes/dpo_typographic_vit-b-32_imagenet-100.yaml
#   slurm/prefetch.sh evaluate.py --model runs/lore4 --data clip-benchmark/wds_cifar10
set -euo pipefail
source slurm/settings.sh

if [[ ${1:-} == *.py ]]; then
  trainer=$1 arguments=()
  shift
fi
in_recipe=$([ -z "$recipe" ] || grep -v '^ *#' "$recipe" || true)
if [ -z "${CACHE_DIR:-}" ] && [[ "${arguments[*]} $* $in_recipe" == *://* ]]; then
  echo "error: the shards are behind URLs and CACHE_DIR is not set; expected a directory that the compute nodes see, the" \
    "same for this and for sbatch, as in: export CACHE_DIR=\$SCRATCH/shards" >&2
  exit 2
fi
add_flags --output_dir runs/prefetch "${arguments[@]}" --cache_dir "$cache_dir"
add_flags "$@"
add_flags --prefetch true
HF_HUB_OFFLINE=0 python "$trainer" "${merged[@]}"
