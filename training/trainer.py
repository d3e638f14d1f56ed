"""Trains one phase, float or quantized: the loop over epochs."""

from __future__ import annotations

import random
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.yolo import DetectionModel
from quant.compilation import compile_quantizers
from quant.gabfusion import fusion_nodes
from quant.training import QuantizedTraining
from training.random_state import random_states, restore_random_states
from training.run import Phase, Run
from utils.boxes import xywh_to_xyxy
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.devices import training_type
from utils.ema import ModelEMA
from utils.errors import UserError
from utils.hyp import phase_hyp
from utils.log import LOGGER
from utils.optim import (
    QUANTIZER,
    EarlyStopping,
    Warmup,
    accumulation_steps,
    build_optimizer,
    describe_groups,
    learning_rate_factor,
    scale_weight_decay,
    warmup_iterations,
)
from utils.plots import plot_images
from utils.run_log import RunLog
from val import Evaluation

GRADIENT_CLIP = 10.0  # norm


class Trainer:
    """Trains one phase: a loop over epochs with validation, checkpoints, early stopping and resuming."""

    def __init__(
        self, run: Run, phase: Phase, model: DetectionModel, teacher: nn.Module | None = None, start: dict | None = None
    ) -> None:
        options = run.options
        self.run, self.phase, self.options, self.model = run, phase, options, model.to(run.device)
        self.model.to(memory_format=torch.channels_last)  # 1.15 times faster on CPUs, more on GPUs with mixed precision
        self.hyp = phase_hyp(run.hyp, phase.quantized)
        self._freeze_layers()
        self.ema = ModelEMA(model, self.hyp["ema_decay"], self.hyp["ema_tau"])
        self.optimizer = self._make_optimizer()
        self.type = training_type(getattr(options, "precision", "auto"), run.device)
        self.amp = self.type is torch.float16  # only its gradients need a loss scale
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.amp)
        self.stopper = EarlyStopping(options.patience)
        self.best_fitness, self.first_epoch = -1.0, 0
        self.calibrated: list[float] | None = None  # mAP50 and mAP50-95 before training, for the table at the end
        self.quantized: QuantizedTraining | None = None
        if phase.quantized:
            self.quantized = QuantizedTraining(model, self.ema.ema, run.config, teacher, phase.epochs)
            if getattr(options, "compile", False):
                compile_quantizers(model, {torch.float32, self.type})
        if start is not None:
            self._load(start)
        self.loss = run.make_loss(model)  # after loading: it copies the anchors, which the float phase may have fitted
        columns = self.quantized.columns if self.quantized else ()
        events = run.save_dir if phase.prefix == "" else run.save_dir / phase.name
        self.log = RunLog(run.save_dir / f"{phase.prefix}results.csv", columns, self.first_epoch, events)
        self.largest_objectness = torch.zeros((), device=run.device)

    # --- set-up -----------------------------------------------------------------------------------------------------

    def _freeze_layers(self) -> None:
        listed = self.options.freeze
        frozen = range(listed[0]) if len(listed) == 1 else listed
        prefixes = tuple(f"model.{index}." for index in frozen)
        for name, parameter in self.model.named_parameters():
            if prefixes and name.startswith(prefixes):
                parameter.requires_grad_(False)
        # Statistics of frozen layers stay too: a frozen layer that still moves is a common complaint.
        self.frozen_norms = [
            module
            for name, module in self.model.named_modules()
            if prefixes and name.startswith(prefixes) and isinstance(module, nn.BatchNorm2d)
        ]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        hyp = self.hyp
        decay = scale_weight_decay(hyp["weight_decay"], self.options.batch_size, hyp["nominal_batch"])
        factor = hyp.get("parameter_lr", 1.0)
        optimizer = build_optimizer(
            self.model, self.options.optimizer, hyp["lr0"], hyp["momentum"], decay, hyp["lr0"] * factor
        )
        if self.phase.quantized and len(optimizer.param_groups) > QUANTIZER:
            self._separate_branch_weights(optimizer)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        LOGGER.info(f"  {describe_groups(optimizer)}")
        return optimizer

    def _separate_branch_weights(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives the branch weights of GABFusion a learning rate of their own."""
        logits = [node.logits for node in fusion_nodes(self.model).values() if isinstance(node.logits, nn.Parameter)]
        if not logits:
            return
        chosen = {id(parameter) for parameter in logits}
        group = optimizer.param_groups[QUANTIZER]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        rate = self.hyp["lr0"] * self.run.config.gabfusion.learning_rate
        optimizer.add_param_group({"params": logits, "lr": rate, "weight_decay": 0.0, "name": "fusion"})

    # --- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Runs the epochs that are left, then writes the final state of this phase's checkpoints."""
        batches = len(self.run.train_loader)
        nominal = self.hyp["nominal_batch"]
        warmup = Warmup(
            self.optimizer, warmup_iterations(self.hyp["warmup_epochs"], batches, 1 if self.phase.quantized else 100),
            self.hyp["warmup_bias_lr"], self.hyp["warmup_momentum"], self.hyp["momentum"],
            self.options.batch_size, nominal,
        )  # fmt: skip
        for epoch in range(self.first_epoch, self.phase.epochs):
            started = time.perf_counter()
            parts = self._train_epoch(epoch, warmup)
            if self.quantized:
                self.quantized.set_progress((epoch + 1) / self.phase.epochs)
            self.ema.update_attributes(self.model, ("yaml", "nc", "names"))
            rates = [group["lr"] for group in self.optimizer.param_groups[:3]]
            self._step_schedule(epoch)
            last = epoch + 1 == self.phase.epochs
            result = None if self.options.noval and not last else self.run.evaluate(self.ema.ema, self.loss, plots=last)
            stop = self._finish_epoch(epoch, parts, rates, result, time.perf_counter() - started)
            if stop:
                LOGGER.info(f"Stopped early: no progress for {self.options.patience} epochs")
                break
        if self.quantized and not self.quantized.deployable and self.run.config.gabfusion.fold == "finetune":
            self._finetune()
        self.log.close()
        self._finalise()

    def _schedule(self, epoch: int) -> float:
        """Share of the initial learning rates at the start of ``epoch``."""
        epochs, tail = max(self.phase.epochs, 1), self.hyp["lr_tail"]
        return learning_rate_factor(epoch, epochs, self.hyp["lrf"], self.options.cos_lr, tail)

    def _step_schedule(self, epoch: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule(epoch + 1)

    def _train_epoch(self, epoch: int, warmup: Warmup) -> Tensor:
        """One pass over the training images; returns the mean loss parts (3,)."""
        run, batches = self.run, len(self.run.train_loader)
        self.model.train()
        for norm in self.frozen_norms:
            norm.eval()
        run.train_loader.set_epoch(epoch + (1_000_000 if self.phase.quantized else 0))
        accumulate = accumulation_steps(self.options.batch_size, self.hyp["nominal_batch"])
        parts_sum = torch.zeros(3, device=run.device)
        self.largest_objectness.zero_()
        self.optimizer.zero_grad(set_to_none=True)
        since_step = 0
        label = f"{self.phase.name} {epoch + 1}/{self.phase.epochs}"
        bar = tqdm(run.train_loader, label, leave=False, disable=not sys.stderr.isatty())
        for index, (images, targets, paths, _) in enumerate(bar):
            iteration = epoch * batches + index
            if warmup.active(iteration):
                accumulate = warmup.step(iteration, self._schedule(epoch))
            if self.quantized:
                self.quantized.set_progress(iteration / (batches * self.phase.epochs))
            if epoch == 0 and index < 3 and not self.options.noplots and not self.phase.prefix:
                self._plot_batch(images, targets, paths, run.save_dir / f"train_batch{index}.jpg")
            parts_sum += self._step(images, targets, measure=index == batches // 2)
            since_step += 1
            if since_step >= accumulate or index + 1 == batches:
                self._optimize()
                since_step = 0
        parts = parts_sum / batches
        if not torch.isfinite(parts).all():
            raise UserError(
                f"the loss is not finite in epoch {epoch + 1} (box, obj, cls: {parts.tolist()}). Lower the learning "
                f"rate; the checkpoint of the epoch before is in {run.weights_dir}"
            )
        return parts

    def _plot_batch(self, images: Tensor, targets: Tensor, paths: list[str], file: Path) -> None:
        height, width = images.shape[2:]
        corners = xywh_to_xyxy(targets[:, 2:]) * torch.tensor((width, height, width, height))
        plot_images(images, torch.cat((targets[:, :2], corners), 1), paths, file, self.run.names)

    def _step(self, images: Tensor, targets: Tensor, measure: bool) -> Tensor:
        """Forward and backward of one batch; returns the detached loss parts (3,)."""
        device = self.run.device
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last).float() / 255
        targets = targets.to(device, non_blocking=True)
        if self.options.multi_scale:
            images = self._rescale(images)
        features = self.quantized.features if self.quantized else ()
        if self.quantized:
            self.quantized.set_probe(measure)
        with torch.autocast(device.type, self.type, enabled=self.type is not torch.float32):
            output = self.model(images, features=features)
            raw, maps = output if features else (output, {})
            loss, parts = self.loss(raw, targets)
            if features:
                terms = self.quantized.distillation(images, maps, raw)
                if measure:
                    self.quantized.measure_ratios(loss, terms, maps)
                loss = loss + sum(terms.values())
            penalty = self.quantized.penalty(images.shape[0]) if self.quantized else None
            if penalty is not None:
                loss = loss + penalty
        if measure:
            # As a tensor: reading the number here would make the host wait for the device.
            self.largest_objectness = torch.stack([level[..., 4].detach().amax() for level in raw]).amax().sigmoid()
        self.scaler.scale(loss).backward()
        return parts

    def _rescale(self, images: Tensor) -> Tensor:
        size = self.options.imgsz
        side = random.randrange(round(size * 0.5), round(size * 1.5) + self.run.stride) // self.run.stride
        side = max(side, 1) * self.run.stride
        return images if side == size else nn.functional.interpolate(images, (side, side), mode="bilinear")

    def _optimize(self) -> None:
        scale = self.scaler.get_scale() if self.amp else 1.0
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.amp and self.scaler.get_scale() < scale:
            return  # gradients overflowed and the step was skipped
        if self.quantized:
            self.quantized.after_backward(scale)
        self.ema.update(self.model)

    def _finish_epoch(
        self, epoch: int, parts: Tensor, rates: list[float], result: Evaluation | None, seconds: float
    ) -> bool:
        """Logs and saves; returns whether to stop early."""
        values = dict(zip(("train/box_loss", "train/obj_loss", "train/cls_loss"), parts.tolist(), strict=True))
        values |= {f"x/lr{i}": rate for i, rate in enumerate(rates)}
        line = f"{self.phase.name} {epoch + 1:>3}/{self.phase.epochs}  loss {float(parts.sum()):.4f}"
        deployable = self.quantized.deployable if self.quantized else True
        stop = False
        if result is not None:
            values |= {
                "metrics/precision": result.precision,
                "metrics/recall": result.recall,
                "metrics/mAP_0.5": result.map50,
                "metrics/mAP_0.5:0.95": result.map,
            }
            values |= dict(zip(("val/box_loss", "val/obj_loss", "val/cls_loss"), result.losses, strict=True))
            values |= result.localisation
            line += f"  P {result.precision:.3f}  R {result.recall:.3f}  mAP50 {result.map50:.4f}  mAP {result.map:.4f}"
        line += f"  {len(self.run.train_set) / seconds:.0f} images/s with validation"
        LOGGER.info(line + ("" if deployable else "  (normalised, not for export)"))
        if self.quantized:
            values |= self.quantized.end_epoch(float(self.largest_objectness), values)
        self.log.write(epoch, values)
        best = False
        if result is not None and deployable:
            best = result.fitness >= self.best_fitness
            self.best_fitness = max(self.best_fitness, result.fitness)
            stop = self.stopper.step(epoch, result.fitness)
        if not self.options.nosave or epoch + 1 >= self.phase.epochs or stop:
            checkpoint = self._checkpoint(epoch)
            # The best one first: a run that is killed between the two resumes before this epoch and saves it again. The
            # other way round last.pt would know of a best fitness whose network was never kept.
            if best:
                save_checkpoint(checkpoint, self._file("best"))
            save_checkpoint(checkpoint, self._file("last"))
            if self.options.save_period > 0 and (epoch + 1) % self.options.save_period == 0:
                save_checkpoint(checkpoint, self._file(f"epoch{epoch}"))
        return stop

    def _finetune(self) -> None:
        """The paper's end (``fold: finetune``): constants for the statistics, then one epoch of Adam at 2e-5."""
        LOGGER.info("Fusion statistics become constants; fine-tuning one epoch")
        self.quantized.fix_statistics(self.run.calibration_batches())
        self.ema = ModelEMA(self.model, decay=0.0)  # the constants are fitted to these weights, not to an average
        self.quantized.average = self.ema.ema
        rate = self.hyp["finetune_lr"]
        self.optimizer = build_optimizer(self.model, "Adam", rate, 0.9, 0.0, rate)
        idle = Warmup(self.optimizer, 0, 0.0, 0.9, 0.9, self.options.batch_size, self.hyp["nominal_batch"])
        self.model.train()
        started = time.perf_counter()
        epochs = self.phase.epochs
        parts = self._train_epoch(epochs, idle)
        result = self.run.evaluate(self.ema.ema, self.loss, plots=True)
        self._finish_epoch(epochs, parts, [rate] * 3, result, time.perf_counter() - started)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        return self.run.weights_dir / f"{self.phase.prefix}{name}.pt"

    def _checkpoint(self, epoch: int) -> dict:
        detect = self.model.detect
        return {
            "model_yaml": self.model.yaml,
            "names": self.run.names,
            "stride": detect.stride.tolist(),
            "anchors": detect.anchors,
            "model": self.model.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "ema_updates": self.ema.updates,
            "quantization": self.run.config.to_dict() if self.phase.quantized else None,
            "hyp": self.run.hyp,
            "options": vars(self.options),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "stopper": self.stopper.state_dict(),
            "first_steps": self.quantized.first_steps if self.quantized else None,
            "calibrated": self.calibrated,
            "random": random_states(),
            "epoch": epoch,
            "best_fitness": self.best_fitness,
            "phase": self.phase.name,
            "epochs": self.phase.epochs,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _load(self, checkpoint: dict) -> None:
        """Continues after the epoch that ``checkpoint`` was written at."""
        self.model.load_state_dict(checkpoint["model"])
        self.ema.ema.load_state_dict(checkpoint["ema"])
        self.ema.updates = checkpoint["ema_updates"]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.stopper.load_state_dict(checkpoint["stopper"])
        self.best_fitness = checkpoint["best_fitness"]
        self.calibrated = checkpoint.get("calibrated")
        if self.quantized:
            self.quantized.first_steps = checkpoint["first_steps"]
        self.first_epoch = checkpoint["epoch"] + 1
        restore_random_states(checkpoint["random"])
        LOGGER.info(f"Resuming the {self.phase.name} phase at epoch {self.first_epoch + 1}/{self.phase.epochs}")

    def _finalise(self) -> None:
        """Drops what only resuming needs from the finished phase's checkpoints."""
        for name in ("last", "best"):
            file = self._file(name)
            if file.exists():
                checkpoint = load_checkpoint(file)
                checkpoint |= {"model": None, "optimizer": None, "scaler": None, "random": None, "finished": True}
                save_checkpoint(checkpoint, file)
