"""Settings that both trainers have, in the same words; each adds those of its method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from utils.cli import flag, required


@dataclass
class RunSettings:
    """Model, data, optimisation and output of a run."""

    model_name_or_path: str = required("Hugging Face id or local directory", group="model", path=True)
    reference_model_name_or_path: str | None = flag(
        None, "frozen reference, to go on from a fine-tuned model (default: the start model)", group="model", path=True
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward passes: less memory, more time", group="model"
    )
    shard_reference: bool = flag(
        False,
        "DeepSpeed: shard the frozen reference over the processes too, for encoders too large to copy",
        group="model",
    )
    reference_dtype: str = flag(
        "float32",
        "weights of the reference's blocks; bfloat16 halves them, needs mixed_precision bf16, changes no embedding",
        group="model",
        choices=("float32", "bfloat16"),
    )
    compile: bool = flag(
        False, "torch.compile the encoders (and the attack): a minute or two at the start, then faster", group="model"
    )
    tf32: bool = flag(
        False,
        "NVIDIA GPUs: float32 products in TF32, but for the patch embedding; for mixed_precision no",
        group="model",
    )

    train_shards: list[str] = required(
        "brace-expanded paths, globs, directories, hf:// or https:// URLs of .tar shards",
        group="data",
        path=True,
        many=True,
    )
    eval_shards: list[str] = flag([], "shards for the periodic evaluation (default: none)", group="data", path=True)
    eval_num_samples: int = flag(1000, "the first N samples of the evaluation shards", group="data", minimum=1)
    classnames: str | None = flag(
        None,
        "file with one class name per line (default: classnames.txt beside the shards or one folder up)",
        group="data",
        path=True,
    )
    num_workers: int | None = flag(None, "data workers per process (default: measured)", group="data", minimum=0)
    jpeg_draft: bool = flag(
        False,
        "decode large training JPEGs at reduced size: faster from 896 pixels a side on, other pixels",
        group="data",
    )
    cache_dir: str | None = flag(
        None,
        "where shards behind URLs, indexes and embeddings are kept (default: the system's cache)",
        group="data",
        path=True,
    )
    cache_limit_gb: float | None = flag(
        None, "most that shards behind URLs may take there, in 10^9 bytes (default: no limit)", group="data", above=0
    )
    max_bad_fraction: float = flag(
        0.01,
        "the run stops where more than this share of the samples is unreadable",
        group="data",
        minimum=0,
        maximum=1,
    )
    allow_pipe_urls: bool = flag(
        False, "allow pipe: URLs, which execute shell commands; not in a recipe", group="data", in_recipe=False
    )
    prefetch: bool = flag(
        False,
        "bring all that the run needs into the caches and stop: for nodes without internet, see docs/offline.md",
        group="data",
    )

    learning_rate: float | None = flag(None, "cosine to 0", group="optimisation", minimum=0)
    dual_learning_rate: float = flag(5e-4, "of the multiplier (AdamW), same schedule", group="optimisation", minimum=0)
    weight_decay: float = flag(0.0, "of the optimizer, on all that is trained", group="optimisation", minimum=0)
    warmup_steps: int = flag(0, "steps of linear warm-up", group="optimisation", minimum=0)
    max_grad_norm: float = flag(0.0, "gradient clipping, 0 for none", group="optimisation", minimum=0)
    per_device_train_batch_size: int = flag(128, "samples per process and micro-batch", group="optimisation", minimum=1)
    gradient_accumulation_steps: int | None = flag(
        None, "micro-batches per step (default: 1, or what --global_batch_size needs)", group="optimisation", minimum=1
    )
    global_batch_size: int | None = flag(
        None,
        "samples per step over all processes and micro-batches (default: what the other two give)",
        group="optimisation",
        minimum=1,
    )
    epochs: int = flag(2, "passes over the training set", group="optimisation", minimum=1)
    train_num_samples: int | None = flag(None, "samples per epoch (default: all)", group="optimisation", minimum=1)
    max_steps: int | None = flag(None, "steps in all, in place of --epochs", group="optimisation", minimum=1)
    seed: int = flag(0, "of every random draw", group="optimisation", minimum=0, maximum=2**32 - 1)

    output_dir: str = required(
        "directory of the run: the trained model, metrics.jsonl, checkpoints/", group="output", path=True
    )
    eval_steps: int = flag(
        500, "steps between evaluations; one more at step 0 and at the end", group="output", minimum=1
    )
    logging_steps: int = flag(10, "steps between log rows", group="output", minimum=1)
    checkpoint_steps: int = flag(500, "steps between checkpoints, 0 for none", group="output", minimum=0)
    checkpoints_total_limit: int = flag(3, "checkpoints kept, 0 for all", group="output", minimum=0)
    resume_from_checkpoint: str | None = flag(
        None, "a checkpoint directory, or latest (starts anew where there is none yet)", group="output", path=True
    )
    keep_best: str | None = flag(None, "the model with the highest value of this is kept in best/", group="output")
    report_to: str = flag(
        "tensorboard",
        "tracker; metrics.jsonl is always written",
        group="output",
        choices=("tensorboard", "wandb", "none"),
    )

    @property
    def models(self) -> list[tuple[str, str | None]]:
        """(flag, name or path) of the models that the run reads."""
        return [(f"--{name}", getattr(self, name)) for name in ("model_name_or_path", "reference_model_name_or_path")]

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


# May differ between a run and its continuation: where and how often, not what is computed. A trainer adds its own.
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
    *("keep_best", "per_device_train_batch_size", "gradient_accumulation_steps"),
}
