"""The training loop: one process or many, resumed exactly."""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..contexts import evaluating, write_atomic
from ..data import DATASETS, TrainLoader
from ..data.scene_loader import SceneTrainLoader
from ..registry.checkpoint import WEIGHTS
from . import build
from .evaluate import Batches, describe
from .metrics import Recorder, draw_curves, finite, hardware, has_bf16_units, versions, write_json
from .recipe import Recipe, make_recipe
from .signals import hold_signals
from .start import init_file, init_seconds, init_weights
from .state import (
    DIVERGED,
    finished_metrics,
    load_checkpoint,
    open_folder,
    run_folder,
    save_checkpoint,
    save_weights,
    seed_step,
)
from .task import make_task

if TYPE_CHECKING:
    from accelerate import Accelerator

GPU_CHECK_EVERY = 50  # steps between looks at the loss: each look waits for the GPU
_STEADIER = "a lower lr or clip_grad may help"


class _DivergedError(RuntimeError):
    """The loss is no longer finite."""


def train(
    recipe: Recipe,
    data_dir: str | os.PathLike[str] | None,
    output: str | os.PathLike[str] = "runs",
    *,
    resume: bool = True,
    checkpoint_steps: int = 0,
    limit_steps: int = 0,
    limit_seconds: float = 0,
    download: bool = False,
    cpu: bool = False,
) -> dict[str, Any] | None:
    """Train by a recipe, in this process or, under `torchrun`, in several.

    The run folder is `<output>/<name>-s<seed>`. A run that was ended in any way goes on from its last checkpoint when
    called again, and ends equal to the bit to one that was not ended (on a GPU with `deterministic`; with the same
    number of processes). A finished run is not trained again. At SIGTERM or Ctrl-C it writes a checkpoint before the
    signal takes its course; a second Ctrl-C ends it at once.

    Args:
        recipe: the run.
        data_dir: data folder; None takes `POOLSKIP_DATA_DIR`.
        output: folder of run folders.
        resume: go on from the run folder's checkpoint; False removes what a run wrote there.
        checkpoint_steps: also write a checkpoint after every so many steps, >= 0; 0 for after each epoch alone.
        limit_steps: stop with a checkpoint after so many steps in this call, >= 0; 0 for no limit.
        limit_seconds: stop with a checkpoint after so much time in this call, >= 0; 0 for no limit.
        download: let torchvision fetch the data set.
        cpu: train on the CPU where there is a GPU.

    Returns:
        What `metrics.json` holds, or None if stopped by a limit.

    Raises:
        ValueError: if the recipe does not fit model, data, devices, or the run that the folder holds.
        FileNotFoundError: if data or the weights to start from are missing.
        RuntimeError: if the loss is no longer finite, the disk is full, a checkpoint is damaged, or another process
            trains in the run folder.
    """
    limits = {"checkpoint_steps": checkpoint_steps, "limit_steps": limit_steps, "limit_seconds": limit_seconds}
    for key, value in limits.items():
        if value < 0:
            raise ValueError(f"{key}={value} must be at least 0")
    deadline = time.monotonic() + limit_seconds if limit_seconds else math.inf
    folder = run_folder(output, recipe)
    if resume and (metrics := finished_metrics(folder, recipe)) is not None:
        return metrics
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    if recipe.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not recipe.deterministic
    try:
        accelerator = build.make_accelerator(recipe, cpu)
        run = _Run(recipe, folder, accelerator, data_dir, download)
        try:
            run.open(resume)
            with hold_signals() as terminated:
                ended = run.fit(checkpoint_steps, limit_steps, lambda: time.monotonic() > deadline or terminated())
            return run.finish() if ended else None
        except _DivergedError as error:
            if run.main:
                write_atomic(folder / DIVERGED, f"{error}\n".encode())
            raise
        finally:
            run.close()
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark


class _Run:
    """State of one run in one process."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        accelerator: "Accelerator",
        data_dir: str | os.PathLike[str] | None,
        download: bool,
    ) -> None:
        from timm.layers import convert_sync_batchnorm
        from timm.utils import ModelEmaV3

        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.task = make_task(recipe)
        torch.manual_seed(recipe.seed)
        model = self.task.make_model()
        self.task.check_output(model)
        self.loader: TrainLoader | SceneTrainLoader
        self.val_loader: Batches | None
        # One process of each machine fetches the data, and the others find them.
        with accelerator.local_main_process_first() if download else nullcontext():
            self.loader, self.val_loader = self.task.make_loaders(data_dir, download, accelerator)
        model = model.to(accelerator.device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if recipe.sync_bn and accelerator.num_processes > 1:
            model = convert_sync_batchnorm(model)
        self.model: nn.Module = model
        ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup) if recipe.ema_decay else None
        self.ema: ModelEmaV3 | None = ema
        optimizer = build.make_optimizer(recipe, model)
        self.scheduler = build.make_scheduler(recipe, optimizer, self.loader.steps)
        self.mixup = build.make_mixup(recipe)
        self.criterion = self.task.make_criterion().to(accelerator.device)
        if recipe.compile:
            model.compile(dynamic=False)  # the few sizes have a graph each
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.epoch, self.step, self.checked, self.seconds = 0, 0, 0, 0.0
        self.losses = torch.zeros(self.loader.steps, device=accelerator.device)
        self.history: list[dict[str, Any]] = []
        self.recorder: Recorder | None = None
        self.bar: Any = None
        self.lock: int | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def open(self, resume: bool) -> None:
        """Make or clear the folder, load its checkpoint, open the records and the progress bar."""
        from tqdm import tqdm

        if self.main:
            self.lock = open_folder(self.folder, resume)
        self.accelerator.wait_for_everyone()
        state = load_checkpoint(self.folder)
        begun = ""
        if state is not None:
            self._restore(state)
        elif self.recipe.init:
            begun = self._start()
        if not self.main:
            return
        write_atomic(self.folder / "recipe.yaml", self.recipe.to_yaml().encode())
        self.recorder = Recorder(self.folder, self.history)
        done = self.epoch * self.loader.steps + self.step
        size = self.recipe.batch_size
        self.bar = tqdm(
            desc=self.recipe.name,
            total=self.recipe.epochs * self.loader.steps * size,
            initial=done * size,
            unit="img",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 60.0,
        )
        emulated = self.accelerator.device.type == "cpu" and self.recipe.precision == "bf16" and not has_bf16_units()
        if emulated:
            self.bar.write("this CPU emulates bfloat16, which may be several times slower: --set precision=fp32")
        if begun:
            self.bar.write(begun)
        if done:
            where = f"epoch {self.epoch + 1}, step {self.step + 1}" if self.epoch < self.recipe.epochs else "the end"
            self.bar.write(f"resumed at {where}")

    def _start(self) -> str:
        """Load the recipe's first weights; their training counts in the run's time. Return a line to show."""
        path = init_file(self.recipe, self.folder.parent)
        weights, fresh = init_weights(path, self.model)
        for model in (self.model, *([self.ema.module] if self.ema is not None else [])):
            model.load_state_dict(weights)
        self.seconds = init_seconds(self.recipe, path)
        return f"starts from {path}" + (f", {', '.join(fresh)} fresh" if fresh else "")

    def fit(self, checkpoint_steps: int, limit_steps: int, late: Callable[[], bool]) -> bool:
        """Train to the end; return False if stopped, with a checkpoint, after so many steps or because it is late."""
        begun, taken = time.perf_counter(), 0
        check_every = 1 if self.accelerator.device.type == "cpu" else GPU_CHECK_EVERY
        several = self.accelerator.num_processes > 1
        while self.epoch < self.recipe.epochs:
            self.wrapped.train()
            first, epoch_begun = self.step, time.perf_counter()
            while self.step < self.loader.steps:
                self._train_step()
                taken += 1
                look = self.step % check_every == 0 or self.step == self.loader.steps
                if look:
                    self._check_losses()
                # Several processes ask each other, which waits for the GPU too.
                stop = taken == limit_steps or (look and self._any(late()) if several else late())
                if self.step < self.loader.steps and (stop or (checkpoint_steps and self.step % checkpoint_steps == 0)):
                    self._save(begun)
                    if stop:
                        return False
            speed = (self.step - first) * self.recipe.batch_size / (time.perf_counter() - epoch_begun)
            self._end_epoch(speed)
            self._save(begun)
            if stop and self.epoch < self.recipe.epochs:
                return False
        self.seconds += time.perf_counter() - begun
        return True

    def _any(self, late: bool) -> bool:
        """Whether it holds in any of several processes; clocks differ, and a signal may reach only one."""
        flag = torch.tensor(float(late), device=self.accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _train_step(self) -> None:
        """Make one update of the weights."""
        recipe, accelerator = self.recipe, self.accelerator
        update = self.epoch * self.loader.steps + self.step
        self.scheduler.step_update(update)
        total = torch.zeros((), device=accelerator.device)
        for micro in range(recipe.accumulation):
            seed_step(recipe.seed, update * recipe.accumulation + micro, accelerator.process_index)
            images, labels = self.loader.batch(self.epoch, self.step, micro)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            last = micro == recipe.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss = self.criterion(self.wrapped(images), labels) / recipe.accumulation
                accelerator.backward(loss)
            total += loss.detach()
        if recipe.clip_grad:
            accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=update + 1)
        self.losses[self.step] = total
        self.step += 1
        if self.bar is not None:
            self.bar.update(recipe.batch_size)

    def _check_losses(self) -> None:
        """Average the losses not seen yet over the processes, and stop all of them at one that is not finite."""
        start, self.checked = self.checked, self.step
        if start == self.step:
            return
        part = self.losses[start : self.step]
        if self.accelerator.num_processes > 1:
            part.copy_(self.accelerator.reduce(part, reduction="mean"))
        values = part.tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                where = f"epoch {self.epoch + 1}, step {start + offset + 1} of {self.loader.steps}"
                raise _DivergedError(f"{self.recipe.name}: the loss is {value} at {where}; {_STEADIER}")
        if self.bar is not None:
            self.bar.set_postfix(epoch=self.epoch + 1, loss=f"{values[-1]:.3f}", refresh=False)

    def _end_epoch(self, speed: float) -> None:
        """Evaluate, record and count an epoch."""
        scores = self._evaluate(self.ema.module if self.ema is not None else self.model)
        self.epoch, self.step, self.checked = self.epoch + 1, 0, 0
        row = {
            "epoch": self.epoch,
            "step": self.epoch * self.loader.steps,
            "train_loss": self.losses.mean().item(),
            **{f"val_{key}": scores and finite(getattr(scores, key)) for key in self.task.scores},
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": round(speed, 1),
        }
        if self.recorder is None:
            self.history.append(row)
            return
        self.recorder.add(row)
        held_out = f", held-out {describe(dataclasses.asdict(scores))}" if scores else ""
        self.bar.write(
            f"epoch {self.epoch}/{self.recipe.epochs}: train loss {row['train_loss']:.4f}{held_out}, {speed:.0f} img/s"
        )

    def _evaluate(self, model: nn.Module, full_precision: bool = False) -> Any:
        """Measure on the held-out images, with the statistics of process 0 in all processes."""
        if self.val_loader is None:
            return None
        several = self.accelerator.num_processes > 1
        if several:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return self.task.evaluate(
            model,
            self.val_loader,
            autocast=nullcontext if full_precision else self.accelerator.autocast,
            reduce=self.accelerator.reduce if several else None,
        )

    def _save(self, begun: float) -> None:
        """Write the checkpoint; processes wait for each other, so that none runs ahead of it."""
        self._check_losses()
        if self.main:
            scaler = self.accelerator.scaler
            save_checkpoint(
                self.folder,
                {
                    "recipe": dataclasses.asdict(self.recipe),
                    "processes": self.accelerator.num_processes,
                    "images": self.loader.count,
                    "epoch": self.epoch,
                    "step": self.step,
                    "seconds": self.seconds + time.perf_counter() - begun,
                    "losses": self.losses,
                    "history": self.history,
                    "model": self.model.state_dict(),
                    "ema": self.ema.module.state_dict() if self.ema is not None else None,
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                },
            )
        self.accelerator.wait_for_everyone()

    def _restore(self, state: dict[str, Any]) -> None:
        """Load a checkpoint."""
        if make_recipe(state["recipe"]) != self.recipe:
            raise ValueError(f"{self.folder} holds a checkpoint of another recipe: start over with --no-resume")
        if state.get("images", self.loader.count) != self.loader.count:
            raise ValueError(
                f"{self.folder} was begun with {state['images']} training images, and there are {self.loader.count}: "
                "give it the same data, or start over with --no-resume"
            )
        if state["processes"] != self.accelerator.num_processes and self.main:
            print(
                f"{self.folder}: begun with {state['processes']} process(es), goes on with "
                f"{self.accelerator.num_processes}: the result is as good, but not equal to the bit",
                file=sys.stderr,
            )
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.checked = self.step
        self.losses.copy_(state["losses"])
        self.history = state["history"]
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def finish(self) -> dict[str, Any]:
        """Write weights, measure what was written, then write metrics and curves."""
        from safetensors.torch import load_file

        recipe, path = self.recipe, self.folder / WEIGHTS
        if self.main:
            trained = self.ema.module if self.ema is not None else self.model
            save_weights(path, trained, getattr(torch, recipe.save_dtype))
        self.accelerator.wait_for_everyone()
        model = self.task.make_model(trained=True)
        model.load_state_dict(load_file(path))
        model = model.to(self.accelerator.device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        scores = self._evaluate(model, full_precision=True)
        if not self._is_finite(model, scores):
            if self.main:
                path.unlink()
            raise _DivergedError(f"{recipe.name}: the trained model's loss is not finite; {_STEADIER}")
        speeds = sorted(row["images_per_second"] for row in self.history)
        metrics = {
            "name": recipe.name,
            "model": recipe.model,
            "model_args": recipe.model_args,
            "init": recipe.init,
            "dataset": recipe.dataset,
            **{key: getattr(recipe, key) for key in ("image_size", "window", "overlap")},
            "dataset_title": DATASETS[recipe.dataset].title,
            "mean": list(DATASETS[recipe.dataset].mean),
            "std": list(DATASETS[recipe.dataset].std),
            "val": dataclasses.asdict(scores) if scores else None,
            "epochs": recipe.epochs,
            "seed": recipe.seed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds": round(self.seconds, 1),
            "images_per_second": speeds[len(speeds) // 2],
            "hardware": hardware(self.accelerator.device, self.accelerator.num_processes),
            "precision": recipe.precision,
            "versions": versions(),
        }
        if self.main:
            draw_curves(self.folder / "curves.png", self.history, f"{recipe.name}, seed {recipe.seed}")
            for name, value in self.task.files(model).items():
                write_json(self.folder / name, value)
            write_json(self.folder / "metrics.json", metrics)
            (self.folder / DIVERGED).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return metrics

    def _is_finite(self, model: nn.Module, scores: Any) -> bool:
        """Whether a trained model's loss is finite; its logits for some training images where none are held out."""
        if scores:
            return math.isfinite(scores.loss)
        with evaluating(model), torch.no_grad():
            return bool(model(self.loader.batch(0, 0)[0]).isfinite().all())

    def close(self) -> None:
        """Let others into the folder, close the records and the progress bar."""
        if self.lock is not None:
            os.close(self.lock)
        if self.bar is not None:
            self.bar.close()
        if self.recorder is not None:
            self.recorder.close()
