"""Files of the Hugging Face hub on every node: its first process (LOCAL_RANK 0) downloads them, the others find them.

Each node may have its own cache (HF_HOME, --cache_dir on a local disk). An error on one process is raised on all.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel

from utils.data.shards import ShardIndex, refuse_lacking_shards
from utils.data.sources import BRING_IT, ShardCache, hub_answered, hub_offline, one_line
from utils.errors import UserError
from utils.models.open_clip import CLIP_VOCABULARY, holds_text
from utils.models.published import (
    CLIP_TOKENIZER,
    MODEL_TYPES,
    OPEN_CLIP_MODEL_TYPES,
    Layout,
    ModelName,
    check_model,
    completed_by,
    has_text,
    layout,
    load_model,
    model_name,
    nearest,
    refuse_mistyped_path,
    say_once,
    tokenizer_folder,
    weight_files,
    weights_alone,
)
from utils.processes.distributed import everywhere, from_main_process, gather_objects, on_every_node

logger = logging.getLogger(__name__)

Found = TypeVar("Found", Path, ModelName)


def folder_on_every_node(
    accelerator: Accelerator,
    find: Callable[[bool], Found],
    what: str,
    version: Callable[[Found], str] = lambda folder: Path(str(folder)).name,
) -> Found:
    """This node's folder: ``find(False)`` on its first process, which may download, then ``find(True)`` on the others.

    A folder of the hub's cache is named after its commit. Raises UserError if the nodes' commits differ.
    """
    brought = on_every_node(accelerator, lambda: find(False))
    folder = everywhere(accelerator, lambda: brought or find(True))
    versions = sorted(set(gather_objects(accelerator, version(folder))))
    if len(versions) > 1:
        fault = f"the nodes have different versions in their caches ({', '.join(versions)})"
        advice = "bring the same one to all of them, by --prefetch true where there is internet, or delete the old ones"
        raise UserError(f"{what}: {fault}; {advice}")
    return folder


def fetch_model(
    accelerator: Accelerator, name: str | ModelName, flag: str, supported: Sequence[str] = MODEL_TYPES
) -> ModelName:
    """The local files of a model on this node; each node downloads them at most once. Raises ``UserError``."""

    def find(local_files_only: bool) -> ModelName:
        return find_model(name, flag, supported, local_files_only=local_files_only)

    def version(found: ModelName) -> str:
        return " ".join(Path(path).name for path in (found.path, found.base_model, found.processor) if path)

    return folder_on_every_node(accelerator, find, f"{flag} {name}", version)


def refuse_mistyped_paths(models: Sequence[tuple[str, ModelName | None]]) -> None:
    """Raises ``UserError`` for the first (flag, name or None) that cannot be a model. Reads nothing else."""
    for flag, name in models:
        if name is not None:
            refuse_mistyped_path(name, flag)


def find_model(
    text: str | ModelName, flag: str, supported: Sequence[str] = MODEL_TYPES, *, local_files_only: bool = False
) -> ModelName:
    """The name with local paths: as they are, or in the hub's cache with all files that are read. Raises ``UserError``.

    The model's type is checked before its weights are downloaded. If the hub cannot be reached, the cache is used. A
    base model and a processor that the model's own files leave no use for are dropped.
    """
    return _find(model_name(text), flag, supported, True, local_files_only)[0]


def find_config(
    text: str | ModelName, flag: str, supported: Sequence[str] = MODEL_TYPES
) -> tuple[ModelName, PreTrainedConfig | None]:
    """``find_model`` without weights of the hub, and the model's config. Raises ``UserError``.

    The config is None if only the weights will tell, in a repository that holds nothing else.
    """
    return _find(model_name(text), flag, supported, False, False)


def load(text: str | ModelName, flag: str, supported: Sequence[str] = MODEL_TYPES) -> tuple[PreTrainedModel, Any]:
    """``load_model`` of a model that may be the hub's, on one process."""
    return load_model(find_model(text, flag, supported), flag, supported)


def _find(
    name: ModelName, flag: str, supported: Sequence[str], with_weights: bool, local_files_only: bool
) -> tuple[ModelName, PreTrainedConfig | None]:
    refuse_mistyped_path(name, flag)
    here, names, config = name, None, None
    if not os.path.exists(name.path):
        folder, names = _bring(name.path, flag, small_files, local_files_only)
        here = replace(name, path=str(folder))
    found = layout(here, flag, names)
    if found.kind != "weights":
        config = check_model(here, flag, supported)
        here = completed_by(here, found, has_text(config))
        if with_weights and (name.base_model or name.processor) and not (here.base_model or here.processor):
            say_once(f"{name}: has tokenizer and image processor of its own: --base_model, --processor are not for it")
    if here.processor is not None and not os.path.isdir(here.processor):
        here = replace(here, processor=_processor(here.processor, "--processor", local_files_only))
        here = here if config is None else completed_by(here, found, has_text(config))
    base, kinds = None, MODEL_TYPES if found.kind == "transformers" else OPEN_CLIP_MODEL_TYPES
    if here.base_model is not None and not os.path.exists(here.base_model):
        base, of_base = _find(here.base, "--base_model", kinds, False, local_files_only)
        config = of_base if config is None else config
    if with_weights and names is not None:
        _bring(name.path, flag, partial(weight_names, found), local_files_only)
    weights_are_here = found.kind == "weights" and (with_weights or names is None)
    if base is not None:
        if with_weights and weights_are_here and not holds_text(weights_alone(here, found, flag)[0]):
            base, _ = _find(here.base, "--base_model", kinds, True, local_files_only)
        here = replace(here, base_model=base.path)
    if weights_are_here and (with_weights or base is None or config is not None):
        config = check_model(here, flag, supported)
    of_clip = found.kind != "transformers" and config is not None and config.text_config.vocab_size == CLIP_VOCABULARY
    if of_clip and tokenizer_folder(here) is None:
        here = replace(here, tokenizer=_clip_tokenizer(f"{flag} {name}", local_files_only))
    return here, config


def small_files(names: Sequence[str]) -> list[str]:
    """The configs and tokenizer files among the names of a repository."""
    return [name for name in names if "/" not in name and name.endswith((".json", ".txt", ".model", ".jinja"))]


def weight_names(found: Layout, names: Sequence[str]) -> list[str]:
    """The files of the weights among the names of a repository: one format of them."""
    if found.kind != "transformers":
        return [name for name in names if name == found.file]
    safetensors = [name for name in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]
    return safetensors or [name for name in names if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]


def _processor(name: str, flag: str, local_files_only: bool) -> str:
    """The folder with the small files of a repository, such as a tokenizer's."""
    folder, _ = _bring(name, flag, small_files, local_files_only)
    return str(folder)


def _clip_tokenizer(where: str, local_files_only: bool) -> str:
    try:
        return _processor(CLIP_TOKENIZER, "--processor", local_files_only)
    except UserError as error:
        fault = f"holds no tokenizer, and CLIP's own cannot be had ({error})"
        raise UserError(f"{where}: {fault}; name a directory that holds it by --processor") from None


def _bring(
    repository: str, flag: str, choose: Callable[[Sequence[str]], list[str]], local_files_only: bool
) -> tuple[Path, list[str]]:
    """The folder in the hub's cache with the chosen files of a repository, and the names of all its files."""
    from huggingface_hub import HfApi, snapshot_download

    if hub_offline():
        return _cached(repository, flag, choose, "HF_HUB_OFFLINE is set")
    if local_files_only:
        return _cached(repository, flag, choose, "this node's first process did not bring it")
    try:
        names = [file.rfilename for file in HfApi().model_info(repository).siblings or []]
        chosen = [glob.escape(name) for name in choose(names)] or [".gitattributes"]  # in every repository
        return Path(snapshot_download(repository, allow_patterns=chosen)), names
    except Exception as error:  # the hub raises its own errors, httpx errors and OSError
        reason = one_line(error)
        if hub_answered(error):
            fault = f"neither a local model directory nor a model that the hub gives out ({reason})"
            advice = "check the name, or log in with `hf auth login` if it is private or gated"
            raise UserError(f"{flag} {repository}: {fault}; {advice}") from None
        found = _cached(repository, flag, choose, f"the download failed ({reason})")
        line = "%s: nothing comes from the hub (%s); taken from %s"
        logger.warning(line, repository, reason, found[0])
        return found


def _cached(
    repository: str, flag: str, choose: Callable[[Sequence[str]], list[str]], reason: str
) -> tuple[Path, list[str]]:
    """``_bring`` from the cache alone. Raises ``UserError`` if it lacks what is chosen."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    lacking = "config.json" if choose is small_files else "its weights"
    try:
        # Without patterns it refuses a folder that lacks any file of the repository. What is needed is checked here.
        folder = Path(snapshot_download(repository, local_files_only=True, allow_patterns=[]))
        names = os.listdir(folder)
        _, parts = weight_files(folder)
        if choose is small_files or (choose(names) and all((folder / part).exists() for part in parts.values())):
            return folder, names
    except LocalEntryNotFoundError:
        pass
    fault = (
        f"neither a local model directory{nearest(repository)} nor a model in the cache, which lacks {lacking} of it"
    )
    raise UserError(f"{flag} {repository}: {fault}, and {reason}; check the path, or {BRING_IT}")


def on_this_node(accelerator: Accelerator, index: ShardIndex, folders: Sequence[str | Path], flag: str) -> None:
    """Replaces the main process's paths in the index by this node's, in ``folders``. UserError for missing shards."""
    for there, here in zip(from_main_process(accelerator, lambda: list(map(str, folders))), map(str, folders)):
        index.urls = [here + url[len(there) :] if url.startswith(f"{there}/") else url for url in index.urls]
        index.cache_dir = here if index.cache_dir == there else index.cache_dir
    on_every_node(accelerator, lambda: refuse_lacking_shards(index.urls, ShardCache(index.cache_dir), flag))
