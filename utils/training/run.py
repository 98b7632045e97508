"""One run of a trainer, from launch to published model: processes, files and timing, independent of the method."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from utils.data.order import TrainBatchSampler
from utils.data.shards import eval_loader, keep_sizes, train_batches
from utils.data.skipped import SkipCounter, count_skipped
from utils.data.sources import default_cache_dir
from utils.model_card import model_card, write_card
from utils.models.encoders import check_reference_dtype
from utils.models.hub import fetch_model, on_this_node, refuse_mistyped_paths
from utils.models.published import (
    HUB_PREFIX,
    MODEL_TYPES,
    ModelName,
    check_model,
    export_open_clip,
    has_text,
    open_clip_fields,
)
from utils.processes.distributed import (
    average_gradients,
    compute_dtype,
    everywhere,
    from_main_process,
    gather_objects,
    start_accelerator,
    warn_of_emulation,
)
from utils.processes.environment import launched_processes
from utils.processes.interruption import GivenUp, StopRequest
from utils.processes.launch import launch_settings, launched_command
from utils.processes.progress import RunProgress
from utils.processes.tracker import end_training, keep_facts, log_row, start_tracker
from utils.redaction import shown_setting
from utils.sets.labelled import LabelledSet, open_set, set_digest
from utils.training.checkpoint import (
    best_so_far,
    find_checkpoint,
    load_checkpoint,
    publish_model,
    read_state,
    refuse_changed_settings,
    refuse_non_finite,
    refuse_unwritable,
    replace_model,
    save_checkpoint,
    set_aside_later,
    take_output_dir,
)
from utils.training.data_speed import TimedBatches, measured_workers
from utils.training.metrics import MetricsFile, peak_flops, peak_memory_gib
from utils.training.optimization import (
    accumulation_steps,
    cosine_learning_rate,
    count_steps,
    load_optimizer_state,
    set_learning_rate,
)
from utils.training.settings import FREE_SETTINGS, RunSettings
from utils.training.state import load_parameters


@dataclass(frozen=True)
class Step:
    """A step of a run, and what follows it: logging, evaluation, a checkpoint."""

    index: int  # from 0
    last: bool
    log: bool
    evaluate: bool
    save: bool

    @property
    def done(self) -> int:
        """The number of steps made, including this one."""
        return self.index + 1

    @property
    def due(self) -> bool:
        """Whether the run waits for the device after this step."""
        return self.log or self.evaluate or self.save


@dataclass(frozen=True)
class Trained:
    """The contents of a checkpoint. All processes call ``write_model(directory)``: it may have to gather weights."""

    model: nn.Module  # prepared
    optimizer: Any  # prepared
    write_model: Callable[[Path], None]
    others: dict[str, Any]  # by name: multiplier, dual_optimizer, average; each has a state_dict or is None

    def extra_state(self) -> dict[str, Any]:
        states = {name: other.state_dict() for name, other in self.others.items() if other is not None}
        return {name: state["state"] if "param_groups" in state else state for name, state in states.items()}


class Run:
    """A run from its launch on. Call every method on all processes, in the same order.

    ``script``: the trainer's file. ``updates``: encoder updates per batch. ``free``: settings that may change on
    resume, besides FREE_SETTINGS. ``supported``: model types. Raises ``UserError`` before any model is loaded.
    """

    def __init__(
        self,
        settings: RunSettings,
        script: str,
        *,
        method: str,
        updates: int = 1,
        free: Sequence[str] = (),
        supported: Sequence[str] = MODEL_TYPES,
    ) -> None:
        self.settings, self.script, self.method, self.supported = settings, Path(script).stem, method, supported
        self.free = FREE_SETTINGS | set(free)
        self.output_dir = Path(settings.output_dir)
        # Before the accelerator is made: DeepSpeed reads it then.
        settings.gradient_accumulation_steps = accumulation_steps(
            settings.global_batch_size,
            settings.per_device_train_batch_size,
            launched_processes(),
            settings.gradient_accumulation_steps,
        )
        self.updates_per_step = updates * settings.gradient_accumulation_steps
        self.accelerator = start_accelerator(
            seed=settings.seed,
            numbers={
                "train_micro_batch_size_per_gpu": settings.per_device_train_batch_size,
                "gradient_accumulation_steps": settings.gradient_accumulation_steps,
                "gradient_clipping": settings.max_grad_norm,
            },
            report_to=settings.report_to,
            output_dir=settings.output_dir,
            tf32=settings.tf32,
            compile=settings.compile,
        )
        self.device, self.world_size = self.accelerator.device, self.accelerator.num_processes
        self.compute_dtype = compute_dtype(self.accelerator)
        check_reference_dtype(settings.reference_dtype, self.compute_dtype)
        warn_of_emulation(self.accelerator)
        self.everywhere(lambda: refuse_mistyped_paths(settings.models))
        self.stop = StopRequest(self.accelerator)
        self.on_main(lambda: take_output_dir(self.output_dir))
        self.checkpoint = self.on_main(lambda: find_checkpoint(self.output_dir, settings.resume_from_checkpoint))
        self.on_main(lambda: refuse_unwritable(self.output_dir, [self.script]))
        self.resumed = self.on_main(lambda: read_state(self.checkpoint)) if self.checkpoint else None
        self.first_step = self.done = self.resumed["step"] if self.resumed else 0
        # Recorded and never compared: a run may go on under another launcher.
        self.launch: dict[str, Any] = {"command": launched_command(), "launch": launch_settings(self.accelerator)}
        earlier = self.resumed.get("launches", []) if self.resumed else []  # older checkpoints have none
        self.launches = [*earlier, {"first_step": self.first_step, **self.launch}]
        self.launch_logged = False
        self.last_good: Path | None = self.checkpoint
        self.losses: list[Tensor] = []  # of all updates since the last check; they stay on the device until then
        self.terms: Sequence[str] = ()  # names of the parts that follow each loss
        self.grad_norm: Any = None  # of the last update that was measured
        self.num_workers: Any = settings.num_workers
        self.data_note = ""
        self.said: list[str] = []  # of the last export

    def on_main(self, make: Callable[[], Any]) -> Any:
        return from_main_process(self.accelerator, make)

    def everywhere(self, make: Callable[[], Any]) -> Any:
        return everywhere(self.accelerator, make)

    # ------------------------------------------------------------------------------------------------- before the model

    def open_sets(
        self, train: dict[str, Any], evaluation: dict[str, Any], earlier: dict[str, Any] | None = None
    ) -> tuple[LabelledSet, LabelledSet | None]:
        """The training and evaluation set from the arguments of ``open_set``; None if nothing is evaluated.

        Also counts the steps and compares a resumed run's settings. ``earlier``: values that older checkpoints lack.
        """
        opened = (
            self.on_main(lambda: open_set(**train)),
            self.on_main(lambda: open_set(**evaluation) if evaluation["patterns"] else None),
        )
        settings, cache = self.settings, [self.settings.cache_dir or default_cache_dir()]
        for labelled, options in zip(opened, (train, evaluation)):
            if labelled:
                on_this_node(self.accelerator, labelled.index, cache, options["flag"])
        self.train_set, self.eval_set = opened
        index = self.train_set.index
        if self.resumed:
            keep_sizes(index, self.resumed["sizes"])
        self.samples_per_epoch = settings.train_num_samples or index.num_samples
        self.global_batch_size = (
            settings.per_device_train_batch_size * self.world_size * settings.gradient_accumulation_steps
        )
        self.total_steps = count_steps(
            samples_per_epoch=self.samples_per_epoch,
            num_samples=index.num_samples,
            global_batch_size=self.global_batch_size,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
        )
        known = dataclasses.asdict(settings) | {"global_batch_size": self.global_batch_size}
        self.known_settings = {name: shown_setting(value) for name, value in known.items()}  # without secrets
        if self.resumed:
            before = {"image_size": None} | (earlier or {}) | self.resumed["settings"]
            refuse_changed_settings(before, self.known_settings, self.free)
            self.on_main(lambda: set_aside_later(self.output_dir, self.first_step))
        return self.train_set, self.eval_set

    def fetch_models(self) -> tuple[ModelName, ModelName | None]:
        """The local files of the start model and the reference, downloaded by the first process of every node."""
        start, reference = (
            None if name is None else fetch_model(self.accelerator, name, flag, self.supported)
            for flag, name in self.settings.models
        )
        assert start is not None
        if self.settings.export == "open_clip":
            self.everywhere(lambda: open_clip_fields(check_model(start, "--model_name_or_path"), "--export open_clip"))
        return start, reference

    # ------------------------------------------------------------------------------------------- the model, and data

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Prepares both, after loading the checkpoint's parameters, because engines copy them when they start."""
        if self.checkpoint:
            load_parameters(model, self.checkpoint)
        return self.accelerator.prepare(model, optimizer)

    def restore(self, trained: Trained) -> None:
        """Restores everything else from the checkpoint. Without a checkpoint, sets up the start of a run."""
        fraction = self.settings.max_bad_fraction
        of = None
        if self.settings.keep_best:
            of = set_digest(self.accelerator, self.eval_set, self.settings.eval_num_samples)
        self.best: dict[str, Any] = {"value": -1.0, "of": of}
        self.skips = SkipCounter(self.train_set.index, fraction)
        self.eval_skips: Any = SkipCounter(self.eval_set.index, fraction) if self.eval_set else None
        if self.resumed:
            extra = load_checkpoint(self.accelerator, trained.model, trained.optimizer, self.checkpoint, self.resumed)
            for name, other in trained.others.items():
                if other is None:
                    continue
                if isinstance(other, torch.optim.Optimizer):
                    load_optimizer_state(other, extra.get(name, {}))
                else:
                    other.load_state_dict(extra[name])
            self.skips = self.skips.merge([self.resumed["skips"]] if self.accelerator.is_main_process else [])
            self.best = best_so_far(self.resumed, self.known_settings, self.output_dir, self.best)
        self.all_skips = self.skips

    def _share(self) -> dict[str, int]:
        """This process's part of the data. Seed, shard sizes, global batch size and step determine every batch."""
        return {
            "samples_per_epoch": self.samples_per_epoch,
            "global_batch_size": self.global_batch_size,
            "per_device_batch_size": self.settings.per_device_train_batch_size,
            "rank": self.accelerator.process_index,
            "world_size": self.world_size,
            "first_step": self.first_step,
            "num_steps": self.total_steps,
        }

    def measure_workers(self, dataset: Any, flops_per_sample: int) -> int:
        """Data workers of this process: the number in the settings, or else as many as keep up."""
        self.flops_per_sample = flops_per_sample
        if self.num_workers is None:
            self.num_workers, self.data_note = measured_workers(
                dataset, TrainBatchSampler(**self._share()), flops_per_sample, self.device, self.compute_dtype
            )
            self.known_settings["num_workers"] = self.num_workers
        return self.num_workers

    def train_batches(self, dataset: Any, num_workers: int | None) -> TimedBatches:
        """The batches of all remaining steps, for ``take``. ``num_workers`` is None if the data is in memory."""
        pinned, self.reading = self.device.type == "cuda", num_workers is not None
        batches = train_batches(dataset, **self._share(), num_workers=num_workers or 0, pin_memory=pinned)
        self.batches = TimedBatches(count_skipped(batches, self.skips))
        return self.batches

    # --------------------------------------------------------------------------------------------------------- steps

    @contextlib.contextmanager
    def begun(self, shown: dict[str, str], what: str = "images") -> Iterator[None]:
        """Opens the run's files and its progress line; make all steps inside the block.

        ``shown``: {word: key of a row}, the values that the line shows besides speed and loss.
        """
        self.metrics_file = MetricsFile(self.output_dir / "metrics.jsonl")
        self.on_main(lambda: self.metrics_file.cut_back(self.first_step if self.resumed else -1))
        self.on_main(lambda: keep_facts(self.output_dir / "run.json", self.launch))
        start_tracker(
            self.accelerator,
            self.settings.report_to,
            self.script,
            self.known_settings | self.launch["launch"] | {"command": self.launch["command"]},
            self.output_dir,
            self.first_step,
        )
        self.progress = RunProgress(
            self.method, self.total_steps, done=self.first_step, enabled=self.accelerator.is_main_process
        )
        index = self.train_set.index
        self.progress.note(
            f"{self.method}: {index.num_samples} {what} in {len(index.urls)} shards, global batch "
            f"{self.global_batch_size}, steps {self.first_step} to {self.total_steps}, {self.world_size} x "
            f"{self.device.type}, {self.compute_dtype}"
        )
        if self.data_note:
            self.progress.note(self.data_note)
        self.words = {"img/s": "images_per_second", "loss": "loss"} | shown
        self.shown: dict[str, Any] = {}
        self.logged_step, self.seconds = self.first_step, 0.0
        with self.progress:
            self.stop.loading = False
            yield

    def steps(self) -> Iterator[Step]:
        """The remaining steps. Ends early if the run is told to stop; ``stopped`` is then true."""
        self.stop.ask()
        if self.stopped():
            return
        for index in range(self.first_step, self.total_steps):
            done, last = index + 1, index + 1 == self.total_steps
            settings, self._clock = self.settings, time.perf_counter()
            yield Step(
                index,
                last,
                log=last or done % settings.logging_steps == 0,
                evaluate=self.eval_set is not None and (last or done % settings.eval_steps == 0),
                save=settings.checkpoint_steps > 0 and done % settings.checkpoint_steps == 0,
            )
            if self.stopped():
                return

    def stopped(self) -> bool:
        """Whether the run was told to stop before its last step."""
        return self.done < self.total_steps and self.stop.agreed() is not None

    def gave_up(self) -> bool:
        """Whether a process was told to stop and its data did not arrive, so that the step cannot be made."""
        return self.stop.gave_up()

    def set_learning_rates(self, step: Step, **optimizers: Any) -> None:
        """Sets the learning rate of every optimizer; the keyword is the name of its setting."""
        self.rates = {}
        for name, optimizer in optimizers.items():
            if optimizer is None:
                continue
            peak, warmup = getattr(self.settings, name), self.settings.warmup_steps
            self.rates[name] = cosine_learning_rate(step.index, peak, self.total_steps, warmup)
            set_learning_rate(optimizer, self.rates[name])

    def take(self, batches: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of a step; empty if the run was told to stop and they did not arrive (``gave_up``)."""
        count = self.settings.gradient_accumulation_steps or 1
        taken = self.stop.unless_told(lambda: [next(batches) for _ in range(count)])
        self.stop.ask()
        # Under ZeRO-3 a forward pass gathers weights: no process may start one if another has no batch.
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self.gave_up():
            return []
        return taken or []

    def update(self, loss: Tensor, terms: Tensor, model: nn.Module, optimizer: Any, *, measure: bool = False) -> None:
        """Backward pass, and the optimizer's step if it is due. ``terms``: the loss and its parts, kept for ``check``.

        ``measure``: keep the gradient's norm. Call inside ``accelerator.accumulate(model)``.
        """
        self.accelerator.backward(loss)  # DeepSpeed also clips, by its own config, and updates here
        self.losses.append(terms)
        clip = self.settings.max_grad_norm
        if self.accelerator.sync_gradients and (clip > 0 or measure):
            norm = self.accelerator.clip_grad_norm_(model.parameters(), clip or math.inf)
            if measure:
                self.grad_norm = norm
        optimizer.step()
        optimizer.zero_grad()

    def update_outside(self, module: nn.Module, optimizer: Any) -> None:
        """Updates a module that is not prepared, with its gradients averaged over the processes."""
        average_gradients(self.accelerator, module)
        optimizer.step()
        optimizer.zero_grad()

    def trained(self, step: Step) -> bool:
        """Ends the training part of a step. Returns ``step.due``, and if so first waits for device and processes."""
        self.seconds += time.perf_counter() - self._clock
        self.done = step.done
        if not step.due:
            self.progress.update(step.done)
            return False
        clock = time.perf_counter()
        first_update = self.losses[-self.updates_per_step :][: self.settings.gradient_accumulation_steps]
        self._loss = torch.stack(first_update)[:, 0].mean()
        self.check(self.grad_norm if step.log else None)
        self.seconds += time.perf_counter() - clock  # includes the wait for the device's queue
        return True

    def check(self, grad_norm: Any = None) -> None:
        """Ends the run if a loss since the last check is not finite or too many samples were skipped."""
        if self.losses:
            refuse_non_finite(
                self.accelerator,
                self.losses,
                self.updates_per_step,
                self.done,
                self.last_good,
                first_step=self.first_step,
                terms=self.terms,
                grad_norm=grad_norm,
            )
            self.losses.clear()
        self.all_skips = self.skips.merge(gather_objects(self.accelerator, self.skips.state()))
        self.all_skips.check()

    def row(self, step: Step, values: dict[str, float]) -> dict[str, Any]:
        """A row of metrics: the method's ``values``, loss and gradient norm of the first update, rates and speed."""
        images_per_second = (step.done - self.logged_step) * self.global_batch_size / self.seconds
        row = values | {
            "loss": self.accelerator.reduce(self._loss, reduction="mean").item(),
            "grad_norm": float(self.grad_norm),
            **self.rates,
            "images_per_second": images_per_second,
            "data_wait_fraction": max(gather_objects(self.accelerator, self.batches.wait_fraction(self.seconds))),
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        if peak := peak_flops(self.device):  # log utilisation: the method's FLOPs relative to the peak
            flops_per_second = images_per_second * self.flops_per_sample
            row["model_flops_utilisation"] = flops_per_second / (peak * self.world_size)
        if self.reading and (advice := self.batches.advice(row["data_wait_fraction"], self.num_workers)):
            self.progress.note(advice)
        self.seconds, self.logged_step = 0.0, step.done
        return row

    def record(self, row: dict[str, Any], step: Step | None = None) -> None:
        """Shows a row and writes it to metrics.jsonl and the tracker. ``step`` is None for the row before training.

        The first row of a launch also has its settings, but only in the file: a tracker got them when it started.
        """
        done = step.done if step else 0
        if row:
            row = {"step": done, "samples": done * self.global_batch_size, **row}
            if self.accelerator.is_main_process:
                self.metrics_file.write(row if self.launch_logged else row | {"launch": self.launch["launch"]})
            self.launch_logged = True
            log_row(self.accelerator, row)
        if step:
            self.shown |= {word: row[key] for word, key in self.words.items() if key in row}
            self.progress.update(done, self.shown, report=step.log)

    @contextlib.contextmanager
    def evaluating(self, dataset: Any, what: str) -> Iterator[Iterator[dict[str, Any]]]:
        """This process's batches of the first --eval_num_samples. Ends if the run is told to stop and none arrives."""
        loader = eval_loader(
            dataset,
            num_samples=self.num_eval_samples(dataset),
            batch_size=self.settings.per_device_train_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.world_size,
            num_workers=0,
            pin_memory=self.device.type == "cuda",
        )
        self.eval_skips.seen = 0  # every pass is judged separately
        with contextlib.suppress(GivenUp):
            yield count_skipped(self.progress.within(what, self.stop.patiently(loader), len(loader)), self.eval_skips)
        self.stop.ask()

    def num_eval_samples(self, dataset: Any) -> int:
        return min(self.settings.eval_num_samples, len(dataset))

    def check_evaluation(self) -> None:
        """Ends the run if too many evaluation samples were skipped."""
        self.eval_skips.merge(gather_objects(self.accelerator, self.eval_skips.state())).check()

    # --------------------------------------------------------------------------------------------------------- files

    def save(self, step: Step, row: dict[str, Any], trained: Trained) -> None:
        """Saves the best model so far and a checkpoint, whichever is due after a step."""
        name = self.settings.keep_best
        if name and row.get(name, -1.0) > self.best["value"]:
            self.best |= {"step": step.done, "value": row[name], "metric": name}
            replace_model(self.accelerator, self.output_dir / "best", trained.write_model)
        if step.save:
            self.save_checkpoint(trained)

    def save_checkpoint(self, trained: Trained) -> None:
        """Writes the checkpoint of the last complete step, unless it exists."""
        if self.last_good == self.output_dir / "checkpoints" / f"step-{self.done}":
            return
        self.last_good = save_checkpoint(
            self.accelerator,
            self.output_dir,
            self.done,
            model=trained.model,
            optimizer=trained.optimizer,
            state={
                "step": self.done,
                "settings": self.known_settings,
                "launches": self.launches,
                "skips": self.all_skips.state(),
                "best": self.best,
                "sizes": self.train_set.index.sizes,
            },
            extra_state=trained.extra_state(),
            write_model=trained.write_model,
            total_limit=self.settings.checkpoints_total_limit,
        )

    def complete(self, directory: Path, model: Any, *, about: str, tag: str) -> None:
        """Writes the README.md beside a saved model and, except in a checkpoint, --export's files. On one process."""
        if self.settings.export == "open_clip" and self.output_dir / "checkpoints" not in directory.parents:
            notes = export_open_clip(directory, directory, "--export open_clip", getattr(model, "open_clip_form", None))
            about += " open_clip loads the same directory, as `local-dir:` and the path to it."
            for note in notes if notes != self.said else ():  # best/ is written often
                self.progress.note(f"open_clip: {note}")
            self.said = notes
        skipped = self.all_skips.summary().splitlines()
        evaluations = [row for row in self.metrics_file.read() if any(key.startswith("eval_") for key in row)]
        write_card(
            directory,
            lambda: model_card(
                method=self.method,
                model_class=type(model).__name__,
                with_text=has_text(model.config),
                about=about,
                tags=[model.config.model_type, tag],
                base_model=self.settings.model_name_or_path.removeprefix(HUB_PREFIX),
                settings=self.known_settings,
                launches=self.launches,
                evaluations=evaluations,
                notes=[f"Skipped samples: {line}." for line in skipped],
            ),
        )

    def leave(self, trained: Trained) -> NoReturn:
        """Saves the last complete step of a run that was told to stop, and ends the process."""
        waiting = "while waiting for data, " if self.gave_up() else ""
        told = self.stop.agreed()
        if self.done == self.first_step:
            state = f"before step {self.done + 1}: nothing new to save"
        else:
            self.check()
            self.save_checkpoint(trained)
            state = f"{waiting}after step {self.done}: saved {self.last_good}"
        assert told is not None
        self.stop.leave(told, state, self.progress.note)

    def finish(self, trained: Trained, *notes: str) -> None:
        """Publishes the model, reports skipped samples, and closes the run."""
        publish_model(self.accelerator, self.output_dir, trained.write_model)
        self.progress.note(f"saved {self.output_dir}")
        for line in notes:
            self.progress.note(line)
        for line in self.all_skips.summary().splitlines():
            self.progress.note(f"skipped in all: {line}")
        if self.eval_skips:
            merged = self.eval_skips.merge(gather_objects(self.accelerator, self.eval_skips.state()))
            for line in merged.summary().splitlines():
                self.progress.note(f"skipped in evaluations: {line}")
        end_training(self.accelerator)
        self.stop.close()
