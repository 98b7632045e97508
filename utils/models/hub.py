"""Files of the Hugging Face hub on every node: its first process (LOCAL_RANK 0) downloads them, the others find them.

Each node may have its own cache (HF_HOME, --cache_dir on a local disk). An error on one process is raised on all.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator

from utils.data.shards import ShardIndex, refuse_lacking_shards
from utils.data.sources import BRING_IT, ShardCache, hub_answered, hub_offline, one_line
from utils.errors import UserError
from utils.models.published import MODEL_TYPES, check_model, nearest, refuse_mistyped_path, weight_files
from utils.processes.distributed import everywhere, from_main_process, gather_objects, on_every_node

logger = logging.getLogger(__name__)


def folder_on_every_node(accelerator: Accelerator, find: Callable[[bool], Path], what: str) -> Path:
    """This node's folder: ``find(False)`` on its first process, which may download, then ``find(True)`` on the others.

    A folder of the hub's cache is named after its commit. Raises UserError if the nodes' commits differ.
    """
    brought = on_every_node(accelerator, lambda: find(False))
    folder = everywhere(accelerator, lambda: brought or find(True))
    versions = sorted(set(gather_objects(accelerator, folder.name)))
    if len(versions) > 1:
        fault = f"the nodes have different versions in their caches ({', '.join(versions)})"
        advice = "bring the same one to all of them, by --prefetch true where there is internet, or delete the old ones"
        raise UserError(f"{what}: {fault}; {advice}")
    return folder


def fetch_model(accelerator: Accelerator, name_or_path: str, flag: str, supported: Sequence[str] = MODEL_TYPES) -> str:
    """The local folder of a model on this node; each node downloads it at most once. Raises ``UserError``."""

    def find(local_files_only: bool) -> Path:
        return model_folder(name_or_path, flag, supported, local_files_only=local_files_only)

    return str(folder_on_every_node(accelerator, find, f"{flag} {name_or_path}"))


def refuse_mistyped_paths(models: Sequence[tuple[str, str | None]]) -> None:
    """Raises ``UserError`` for the first (flag, name or None) that cannot be a model. Reads nothing else."""
    for flag, name in models:
        if name is not None:
            refuse_mistyped_path(name, flag)


def model_folder(
    name_or_path: str, flag: str, supported: Sequence[str] = MODEL_TYPES, *, local_files_only: bool = False
) -> Path:
    """The folder itself, or one in the hub's cache with all files that ``from_pretrained`` reads. Raises ``UserError``.

    The model's type is checked before its weights are downloaded. If the hub cannot be reached, the cache is used.
    """
    from huggingface_hub import HfApi, snapshot_download

    refuse_mistyped_path(name_or_path, flag)
    if os.path.isdir(name_or_path):
        folder = name_or_path
    elif hub_offline():
        folder = _cached_model(name_or_path, flag, "HF_HUB_OFFLINE is set")
    elif local_files_only:
        folder = _cached_model(name_or_path, flag, "this node's first process did not bring it")
    else:
        try:
            names = [file.rfilename for file in HfApi().model_info(name_or_path).siblings or []]
            check_model(name_or_path, flag, supported)
            return Path(snapshot_download(name_or_path, allow_patterns=[*map(glob.escape, model_files(names))]))
        except UserError:
            raise
        except Exception as error:  # the hub raises its own errors, httpx errors and OSError
            reason = one_line(error)
            if hub_answered(error):
                fault = f"neither a local model directory nor a model that the hub gives out ({reason})"
                advice = "check the name, or log in with `hf auth login` if it is private or gated"
                raise UserError(f"{flag} {name_or_path}: {fault}; {advice}") from None
            folder = _cached_model(name_or_path, flag, f"the download failed ({reason})")
            logger.warning("%s: nothing comes from the hub (%s); taken from %s", name_or_path, reason, folder)
    check_model(folder, flag, supported)
    return Path(folder)


def model_files(names: Sequence[str]) -> list[str]:
    """The files of a repository that are used: configs, tokenizer and one format of the weights."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]
    weights = weights or [name for name in top if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
    return weights + [name for name in top if name.endswith((".json", ".txt", ".model", ".jinja"))]


def _cached_model(name: str, flag: str, reason: str) -> str:
    """The model's folder in the hub's cache. Raises ``UserError`` if it lacks config or weights."""
    from huggingface_hub import try_to_load_from_cache

    config, lacking = try_to_load_from_cache(name, "config.json"), "config.json"
    if isinstance(config, str):
        folder, lacking = Path(config).parent, "its weights"
        file, parts = weight_files(folder)
        if all((folder / part).exists() for part in parts.values() or [file]):
            return str(folder)
    fault = f"neither a local model directory{nearest(name)} nor a model in the cache, which lacks {lacking} of it"
    raise UserError(f"{flag} {name}: {fault}, and {reason}; check the path, or {BRING_IT}")


def on_this_node(accelerator: Accelerator, index: ShardIndex, folders: Sequence[str | Path], flag: str) -> None:
    """Replaces the main process's paths in the index by this node's, in ``folders``. UserError for missing shards."""
    for there, here in zip(from_main_process(accelerator, lambda: list(map(str, folders))), map(str, folders)):
        index.urls = [here + url[len(there) :] if url.startswith(f"{there}/") else url for url in index.urls]
        index.cache_dir = here if index.cache_dir == there else index.cache_dir
    on_every_node(accelerator, lambda: refuse_lacking_shards(index.urls, ShardCache(index.cache_dir), flag))
