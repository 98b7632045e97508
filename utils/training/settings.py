"""Settings that both trainers share; each trainer adds those of its method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from utils.cli import flag, required
from utils.data.images import MAX_OUTPUT_SIDE
from utils.models.published import BASE_MODEL_HELP, IMAGE_SIZE_HELP, PROCESSOR_HELP, ModelName, model_name

model_flag, data_flag = partial(flag, group="model"), partial(flag, group="data")
optimisation_flag, output_flag = partial(flag, group="optimisation"), partial(flag, group="output")
method_flag = partial(flag, group="method")


@dataclass
class RunSettings:
    """Model, data, optimisation and output of a run."""

    model_name_or_path: str = required(
        "id of the hub, directory or file of weights, or NAME@BASE, see --base_model", path=True, group="model"
    )
    reference_model_name_or_path: str | None = model_flag(
        None, "frozen reference (default: the start model)", path=True
    )
    base_model: str | None = model_flag(None, BASE_MODEL_HELP, path=True)
    processor: str | None = model_flag(None, PROCESSOR_HELP, path=True)
    image_size: int | None = model_flag(None, IMAGE_SIZE_HELP, minimum=1, maximum=MAX_OUTPUT_SIDE)
    gradient_checkpointing: bool = model_flag(False, "recompute activations: less memory, more time")
    shard_reference: bool = model_flag(False, "DeepSpeed: shard the frozen reference over the processes too")
    reference_dtype: str = model_flag(
        "float32",
        "weights of the reference's blocks; bfloat16 halves them, needs mixed_precision bf16",
        choices=("float32", "bfloat16"),
    )
    compile: bool = model_flag(False, "torch.compile: a minute or two at the start, then faster")
    tf32: bool = model_flag(False, "NVIDIA GPUs: float32 products in TF32, for mixed_precision no")

    train_shards: list[str] = required(
        ".tar shards: brace-expanded paths, globs, directories, hf:// or https:// URLs",
        group="data",
        path=True,
        many=True,
    )
    eval_shards: list[str] = data_flag([], "shards for the periodic evaluation (default: none)", path=True)
    eval_num_samples: int = data_flag(1000, "the first N samples of the evaluation shards", minimum=1)
    classnames: str | None = data_flag(
        None,
        "file with one class name per line (default: classnames.txt beside the shards or one folder up)",
        path=True,
    )
    num_workers: int | None = data_flag(None, "data workers per process (default: measured)", minimum=0)
    jpeg_draft: bool = data_flag(False, "decode large training JPEGs at reduced size: faster from 896 pixels a side")
    cache_dir: str | None = data_flag(
        None, "where shards behind URLs, indexes and embeddings are kept (default: the system's cache)", path=True
    )
    cache_limit_gb: float | None = data_flag(
        None, "most that shards behind URLs may take there, in 10^9 bytes (default: no limit)", above=0
    )
    max_bad_fraction: float = data_flag(0.01, "share of unreadable samples that ends the run", minimum=0, maximum=1)
    allow_pipe_urls: bool = data_flag(
        False, "allow pipe: URLs, which execute shell commands; not in a recipe", in_recipe=False
    )
    prefetch: bool = data_flag(False, "fill the caches for nodes without internet, then stop (docs/offline.md)")

    learning_rate: float | None = optimisation_flag(None, "cosine to 0", minimum=0)
    dual_learning_rate: float = optimisation_flag(5e-4, "of the multiplier (AdamW), same schedule", minimum=0)
    weight_decay: float = optimisation_flag(0.0, "of the optimizer, on all that is trained", minimum=0)
    warmup_steps: int = optimisation_flag(0, "steps of linear warm-up", minimum=0)
    max_grad_norm: float = optimisation_flag(0.0, "gradient clipping, 0 for none", minimum=0)
    per_device_train_batch_size: int = optimisation_flag(128, "samples per process and micro-batch", minimum=1)
    gradient_accumulation_steps: int | None = optimisation_flag(None, "micro-batches per step (default: 1)", minimum=1)
    global_batch_size: int | None = optimisation_flag(
        None, "samples per step over all processes and micro-batches (default: what the other two give)", minimum=1
    )
    epochs: int = optimisation_flag(2, "passes over the training set", minimum=1)
    train_num_samples: int | None = optimisation_flag(None, "samples per epoch (default: all)", minimum=1)
    max_steps: int | None = optimisation_flag(None, "steps in all, in place of --epochs", minimum=1)
    seed: int = optimisation_flag(0, "of every random draw", minimum=0, maximum=2**32 - 1)

    output_dir: str = required("folder of the model, metrics.jsonl and checkpoints/", path=True, group="output")
    eval_steps: int = output_flag(500, "steps between evaluations; one more at step 0 and at the end", minimum=1)
    logging_steps: int = output_flag(10, "steps between log rows", minimum=1)
    checkpoint_steps: int = output_flag(500, "steps between checkpoints, 0 for none", minimum=0)
    checkpoints_total_limit: int = output_flag(3, "checkpoints kept, 0 for all", minimum=0)
    resume_from_checkpoint: str | None = output_flag(
        None, "a checkpoint directory, or latest (starts anew where there is none yet)", path=True
    )
    export: str = output_flag(
        "none", "a second layout beside the transformers directory", choices=("none", "open_clip")
    )
    keep_best: str | None = output_flag(None, "the model with the highest value of this is kept in best/")
    report_to: str = output_flag(
        "tensorboard", "tracker; metrics.jsonl is always written", choices=("tensorboard", "wandb", "none")
    )

    @property
    def models(self) -> list[tuple[str, ModelName | None]]:
        """(flag, name) of the models that the run reads; the reference is None if it is the start model."""
        names = {name: getattr(self, name) for name in ("model_name_or_path", "reference_model_name_or_path")}
        parts = self.base_model, self.processor, self.image_size
        return [(f"--{name}", None if text is None else model_name(text, *parts)) for name, text in names.items()]

    def shard_options(self, name: str, with_classes: bool, patterns: list[str] | None = None) -> dict[str, Any]:
        """The arguments of ``open_set`` for --train_shards or --eval_shards."""
        return {
            "patterns": getattr(self, name) if patterns is None else patterns,
            "flag": f"--{name}",
            "with_classes": with_classes,
            "classnames": self.classnames,
            "cache_dir": self.cache_dir,
            "cache_limit_gb": self.cache_limit_gb,
            "allow_pipe_urls": self.allow_pipe_urls,
        }


# These may change when a run resumes: they set where and how often, not what is computed. Each trainer adds its own.
FREE_SETTINGS = {
    *("output_dir", "resume_from_checkpoint", "cache_dir", "cache_limit_gb", "num_workers", "report_to"),
    *(
        "allow_pipe_urls",
        "max_bad_fraction",
        "prefetch",
        "gradient_checkpointing",
        "compile",
        "tf32",
        "shard_reference",
    ),
    *("eval_shards", "eval_num_samples", "eval_steps", "logging_steps", "checkpoint_steps", "checkpoints_total_limit"),
    *("keep_best", "export", "per_device_train_batch_size", "gradient_accumulation_steps"),
}
