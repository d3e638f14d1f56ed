"""Trains one phase, float or quantized: the loop over epochs."""

from __future__ import annotations

import itertools
import math
import random
import time
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from models.yolo import DetectionModel
from quant import kernels
from quant.compilation import compile_quantizers
from quant.gabfusion import fusion_nodes
from quant.prepare import quantizers
from quant.training import QuantizedTraining
from training.diagnosis import FiniteCheck, first_non_finite
from training.random_state import random_states, restore_random_states
from training.run import Phase, Run
from training.screen import BEST, NORMALISED, EpochLines
from utils import distributed
from utils.boxes import xywh_to_xyxy
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.devices import training_type
from utils.drawing import plot_images
from utils.ema import ModelEMA
from utils.errors import UserError
from utils.image_weights import image_weights
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
from utils.progress import progress
from utils.run_log import RunLog
from val import Evaluation

GRADIENT_CLIP = 10.0  # norm
# Added to an epoch's number in the quantized phase, which thereby sees other augmentations than the float phase did.
QUANTIZED_EPOCHS = 1_000_000


class Trainer:
    """Trains one phase: a loop over epochs with validation, checkpoints, early stopping and resuming."""

    def __init__(
        self, run: Run, phase: Phase, model: DetectionModel, teacher: nn.Module | None = None, start: dict | None = None
    ) -> None:
        options = run.options
        self.run, self.phase, self.options, self.model = run, phase, options, model.to(run.device)
        self.model.to(memory_format=torch.channels_last)  # 1.15 times faster on CPUs, more on GPUs with mixed precision
        distributed.copy_from_main(self.model)  # calibrated by each process, perhaps on another kind of processor
        self.hyp = run.phase_hyp(phase.quantized)
        self._freeze_layers()
        self.ema = ModelEMA(model, self.hyp["ema_decay"], self.hyp["ema_tau"])
        self.optimizer = self._make_optimizer()
        self.type = training_type(getattr(options, "precision", "auto"), run.device)
        self.amp = self.type is torch.float16  # only its gradients need a loss scale
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.amp)
        self.stopper = EarlyStopping(options.patience)
        self.best_fitness, self.first_epoch = -1.0, 0
        # The epoch from which on only batch norms learn; behind the last one unless the recipe asks for it.
        self.correction_start = phase.epochs - (run.config.batch_norm.correction if phase.quantized else 0)
        self.calibrated: list[float] | None = None  # mAP50 and mAP50-95 before training, for the table at the end
        self.class_maps = np.zeros(len(run.names))  # mAP50-95 of each class at the last validation
        self.quantized: QuantizedTraining | None = None
        if phase.quantized:
            self.quantized = QuantizedTraining(model, self.ema.ema, run.config, teacher, phase.epochs)
        self.stopped = False
        if start is not None:
            self._load(start)
        if self.quantized:  # now that the quantizers have their ranges
            with distributed.local_main_first():
                self._compile_quantizers(getattr(options, "compile", "auto"))
        self.loss = run.make_loss(model)  # after loading: it copies the anchors, which the float phase may have fitted
        columns = self.quantized.columns if self.quantized else ()
        events = run.save_dir if phase.prefix == "" else run.save_dir / phase.name
        self.log = RunLog(
            run.save_dir / f"{phase.prefix}results.csv" if distributed.is_main() else None, columns, self.first_epoch,
            events, run.wandb, phase.prefix.replace("_", "/"),
            options.float_epochs if phase.quantized and options.needs_float else 0,
        )  # fmt: skip
        self.parallel = self._distribute()  # what training goes through; ``model`` is what it is about
        self.largest_objectness = torch.zeros((), device=run.device)

    # --- set-up -----------------------------------------------------------------------------------------------------

    def _compile_quantizers(self, wish: str | bool) -> None:
        """``--compile``: on a CPU a compiler needs seconds and is tried unasked, on an accelerator half a minute."""
        asked = wish in ("on", True)  # True stands in checkpoints of older runs
        if asked or (wish == "auto" and self.run.device.type == "cpu"):
            compile_quantizers(self.model, {torch.float32, self.type}, required=asked)
        elif wish == "off":
            kernels.switch(False)

    def _freeze_layers(self) -> None:
        prefixes = self.run.frozen_prefixes
        for name, parameter in self.model.named_parameters():
            if prefixes and name.startswith(prefixes):
                parameter.requires_grad_(False)

    def _still_norms(self, epoch: int) -> list[_BatchNorm]:
        """The batch norms whose statistics stand still in ``epoch``: of frozen layers, and under ``freeze`` all."""
        freeze = self.run.config.batch_norm.freeze if self.quantized else 0.0
        everything = freeze > 0 and epoch >= round(self.phase.epochs * (1 - freeze))
        everything = everything or self.correction_start <= epoch < self.phase.epochs
        # Statistics of frozen layers stay too: a frozen layer that still moves is a common complaint.
        chosen = "" if everything else self.run.frozen_prefixes
        return [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) and name.startswith(chosen)
        ]

    def _distribute(self) -> nn.Module:
        """The model, or with several processes one whose backward pass averages the gradients over them."""
        if not distributed.is_active():
            return self.model
        model = self.model
        if getattr(self.options, "sync_bn", False):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        devices = [self.run.device.index] if self.run.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        hyp, options = self.hyp, self.options
        name = options.quant_optimizer if self.phase.quantized else options.optimizer
        decay = scale_weight_decay(hyp["weight_decay"], options.batch_size, hyp["nominal_batch"])
        factor = hyp.get("parameter_lr", 1.0)
        optimizer = build_optimizer(self.model, name, hyp["lr0"], hyp["momentum"], decay, hyp["lr0"] * factor)
        if self.phase.quantized and len(optimizer.param_groups) > QUANTIZER:
            self._separate_branch_weights(optimizer)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        LOGGER.debug(f"  {describe_groups(optimizer)}")
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
        run, batches = self.run, len(self.run.train_loader)
        nominal = self.hyp["nominal_batch"]
        warmup = Warmup(
            self.optimizer, warmup_iterations(self.hyp["warmup_epochs"], batches, 1 if self.phase.quantized else 100),
            self.hyp["warmup_bias_lr"], self.hyp["warmup_momentum"], self.hyp["momentum"],
            self.options.batch_size, nominal,
        )  # fmt: skip
        if self.first_epoch == 0 and not self.options.nosave:
            self._save(self._checkpoint(-1), "last")  # so that a run can be resumed from its first moment on
        last_epoch = self.first_epoch if self.stopped else self.phase.epochs
        self.lines = EpochLines(self.phase.epochs, self.first_epoch, run.device)
        if last_epoch > self.first_epoch:
            LOGGER.info(self.lines.heading())
        for epoch in range(self.first_epoch, last_epoch):
            started = time.perf_counter()
            if epoch == self.correction_start:
                self._begin_correction(epoch)
            parts = self._train_epoch(epoch, warmup)
            speed = len(run.train_set) / (time.perf_counter() - started)
            if self.quantized:
                self.quantized.set_progress(min((epoch + 1) / self.correction_start, 1))
            self.ema.update_attributes(self.model, ("yaml", "nc", "names"))
            rates = [group["lr"] for group in self.optimizer.param_groups[:3]]
            self._step_schedule(epoch)
            last = epoch + 1 == self.phase.epochs
            interval = self.options.bbox_interval
            pictured = last or (interval > 0 and (epoch + 1) % interval == 0)
            result = None if self.options.noval and not last else self._evaluate(epoch, plots=pictured)
            stop = self._finish_epoch(epoch, parts, rates, result, speed)
            if (pictured or stop) and not self.options.noplots:
                self.log.pictures(run.save_dir, epoch)
            if stop:
                LOGGER.info(f"Stopped early: no progress for {self.options.patience} epochs")
                break
        if self.quantized and not self.quantized.deployable and self.run.config.gabfusion.fold == "finetune":
            self._finetune()
        self.log.close()
        if distributed.is_main():
            self._finalise()

    def _evaluate(self, epoch: int, plots: bool) -> Evaluation:
        """Validates the averaged network, in a quantized phase with batch-norm statistics of its own."""
        if self.quantized and (epoch < self.correction_start or epoch >= self.phase.epochs):
            self.run.reestimate_norms(self.ema.ema, epoch + QUANTIZED_EPOCHS)
        distributed.copy_from_main(self.ema.ema)  # batch-norm statistics are of each process's own images
        result = self.run.evaluate(self.ema.ema, self.loss, plots=plots)
        self.class_maps = result.map_by_class(len(self.run.names))
        return result

    def _schedule(self, epoch: float) -> float:
        """Share of the initial learning rates ``epoch`` epochs (and a fraction) after the start."""
        if self.correction_start <= epoch < self.phase.epochs:
            corrected = self.phase.epochs - self.correction_start
            return learning_rate_factor(epoch - self.correction_start, corrected, self.hyp["lrf"])
        epochs, tail = max(self.correction_start, 1), self.hyp["lr_tail"]
        # So that codes settle while steps are tiny. Measured on circuit boards it is level with a line: at 4 bits mAP50
        # 91.4 and 89.9 (two final rates) against 91.2, at 3 bits 82.9 against 83.2.
        cosine = self.options.cos_lr or self.phase.quantized
        return learning_rate_factor(epoch, epochs, self.hyp["lrf"], cosine, tail)

    def _step_schedule(self, epoch: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule(epoch + 1)

    def _train_epoch(self, epoch: int, warmup: Warmup) -> Tensor:
        """One pass over the training images; returns the mean loss parts (3,)."""
        run, batches = self.run, len(self.run.train_loader)
        self.model.train()
        for norm in self._still_norms(epoch):
            norm.eval()
        if self.options.image_weights:
            run.train_loader.sampler.weights = image_weights(run.train_set.labels, self.class_maps)
        run.train_loader.set_epoch(epoch + (QUANTIZED_EPOCHS if self.phase.quantized else 0))
        accumulate = accumulation_steps(self.options.batch_size, self.hyp["nominal_batch"])
        parts_sum = torch.zeros(3, device=run.device)
        self.largest_objectness.zero_()
        self.optimizer.zero_grad(set_to_none=True)
        since_step = 0
        label = f"{self.phase.name} {epoch + 1}/{self.phase.epochs}"
        for index, (images, targets, paths, _) in enumerate(progress(run.train_loader, label)):
            iteration = epoch * batches + index
            # A quantized phase has few epochs: with steps as coarse as those its last one would still run at a third or
            # a quarter of the first rate, and codes would flip until the end.
            share = self._schedule(iteration / batches if self.quantized else epoch)
            if warmup.active(iteration):
                accumulate = warmup.step(iteration, share)
            elif self.quantized and epoch < self.phase.epochs:  # not in the fine-tuning after them
                for group in self.optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * share
            if self.quantized:
                self.quantized.set_progress(min(iteration / (batches * self.correction_start), 1))
            plots = not self.options.noplots and not self.phase.prefix and distributed.is_main()
            if epoch == 0 and index < 3 and plots:
                self._plot_batch(images, targets, paths, run.save_dir / f"train_batch{index}.jpg")
            measure = self.quantized.measures(index, batches) if self.quantized else index == batches // 2
            since_step += 1
            steps = since_step >= accumulate or index + 1 == batches
            parts_sum += self._step(images, targets, measure, epoch, steps)
            if steps:
                self._optimize()
                since_step = 0
        return distributed.mean(parts_sum / batches)

    def _plot_batch(self, images: Tensor, targets: Tensor, paths: list[str], file: Path) -> None:
        height, width = images.shape[2:]
        corners = xywh_to_xyxy(targets[:, 2:]) * torch.tensor((width, height, width, height))
        plot_images(images, torch.cat((targets[:, :2], corners), 1), paths, file, self.run.names)

    def _step(self, images: Tensor, targets: Tensor, measure: bool, epoch: int = 0, steps: bool = True) -> Tensor:
        """Forward and backward of one batch; returns the detached loss parts (3,).

        Args:
            measure: whether the monitors look at this batch.
            steps: whether an optimizer step follows, for which several processes need each other's gradients.
        """
        alone = steps or self.parallel is self.model
        with nullcontext() if alone else self.parallel.no_sync():
            return self._forward_backward(images, targets, measure, epoch)

    def _forward_backward(self, images: Tensor, targets: Tensor, measure: bool, epoch: int) -> Tensor:
        device = self.run.device
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last).float() / 255
        targets = targets.to(device, non_blocking=True)
        if self.options.multi_scale:
            images = self._rescale(images)
        features = self.quantized.features if self.quantized else ()
        if self.quantized:
            self.quantized.set_probe(measure)
        with torch.autocast(device.type, self.type, enabled=self.type is not torch.float32):
            output = self.parallel(images, features=features)
            raw, maps = output if features else (output, {})
            loss, parts = self.loss(raw, targets, shared=True)
            named = dict(zip(("box", "objectness", "class"), parts, strict=True))
            if features:
                terms = self.quantized.distillation(images, maps, raw)
                if measure:
                    self.quantized.measure_ratios(loss, terms, maps)
                    terms = self.quantized.fit_weights(terms)
                loss = loss + sum(terms.values())
                named |= terms
            penalty = self.quantized.penalty(images.shape[0]) if self.quantized else None
            if penalty is not None:
                loss = loss + penalty
                named["penalty"] = penalty
        check = FiniteCheck(named)
        if distributed.is_active():  # before the others get its gradient
            self._refuse_non_finite(check, images, epoch)
        if measure:
            # As a tensor: reading the number here would make the host wait for the device.
            self.largest_objectness = torch.stack([level[..., 4].detach().amax() for level in raw]).amax().sigmoid()
        # The loss is a sum over images, of which a quad is one where there were four. Gradients are averaged over the
        # processes, and the loss is a sum over the images of all of them.
        factor = distributed.world_size() * (4 if self.options.quad else 1)
        self.scaler.scale(loss * factor).backward()
        self._refuse_non_finite(check, images, epoch)
        return parts

    def _refuse_non_finite(self, check: FiniteCheck, images: Tensor, epoch: int) -> None:
        """Raises UserError where a loss is infinite or not a number, before it reaches weights or average."""
        failed = check.failed()
        if not failed:
            return
        with torch.autocast(images.device.type, self.type, enabled=self.type is not torch.float32):
            place = first_non_finite(self.model, images)
        where = f"in the network it begins at {place}" if place else "every layer is finite, only the term is not"
        raise UserError(
            f"the loss is not finite in epoch {epoch + 1} of the {self.phase.name} phase ({', '.join(failed)}); "
            f"{where}. Training stops; {self._kept()}. Lower {self._rate_key()} in the --hyp file, or look at the data "
            "of this term"
        )

    def _rescale(self, images: Tensor) -> Tensor:
        """Scales a batch so that its longer side is between half and one and a half times ``--imgsz``."""
        size, stride = self.options.imgsz, self.run.stride
        side = max(random.randrange(round(size * 0.5), round(size * 1.5) + stride) // stride, 1) * stride
        height, width = images.shape[2:]
        factor = side / max(height, width)
        shape = math.ceil(height * factor / stride) * stride, math.ceil(width * factor / stride) * stride
        return images if factor == 1 else nn.functional.interpolate(images, shape, mode="bilinear")

    def _optimize(self) -> None:
        # The loss scale stays on the device. In a step that float16 overflow cancels the weights stay as they are, so
        # that the average may move all the same; asking first would make the host wait for every backward pass.
        scale = self.scaler.scale(torch.ones((), device=self.run.device)) if self.amp else 1.0
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.quantized:
            self.quantized.after_backward(scale)
        self.ema.update(self.model)

    def _finish_epoch(
        self, epoch: int, parts: Tensor, rates: list[float], result: Evaluation | None, speed: float
    ) -> bool:
        """Logs and saves; returns whether to stop early. ``speed``: images a second."""
        values = dict(zip(("train/box_loss", "train/obj_loss", "train/cls_loss"), parts.tolist(), strict=True))
        values |= {f"x/lr{i}": rate for i, rate in enumerate(rates)}
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
        best = result is not None and deployable and result.fitness >= self.best_fitness
        mark = BEST if best else "" if deployable else NORMALISED
        LOGGER.info(self.lines.line(epoch, parts.tolist(), result, speed, mark))
        LOGGER.debug("  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        if self.quantized:
            values |= self.quantized.end_epoch(float(self.largest_objectness), values) | self.quantized.mean_steps()
        self._check_weights(epoch)
        self._check_agreement(epoch)
        self.log.write(epoch, values)
        if result is not None and deployable:
            self.best_fitness = max(self.best_fitness, result.fitness)
            self.stopped = stop = self.stopper.step(epoch, result.fitness)
        if not self.options.nosave or epoch + 1 >= self.phase.epochs or stop:
            checkpoint = self._checkpoint(epoch)
            # The last one last: a run that is killed before resumes before this epoch and saves all of them again. The
            # other way round last.pt would know of a best fitness whose network was never kept.
            if best:
                self._save(checkpoint, "best")
            if self.options.save_period > 0 and (epoch + 1) % self.options.save_period == 0:
                self._save(checkpoint, f"epoch{epoch}")
            self._save(checkpoint, "last")
        return stop

    def _check_weights(self, epoch: int) -> None:
        """Raises UserError where a step at the end of an epoch, behind the last loss, has left the finite numbers."""
        statistics = ("running_mean", "running_var")
        named = [
            (name, tensor)
            for network in (self.model, self.ema.ema)
            for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers())
            if isinstance(tensor, nn.Parameter) or name.endswith(statistics)
        ]
        finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in named]).tolist()
        if all(finite):
            return
        first = next(name for (name, _), good in zip(named, finite, strict=True) if not good)
        raise UserError(
            f"after epoch {epoch + 1} of the {self.phase.name} phase the weights are not finite, first {first}. "
            f"Training stops; {self._kept()}. Lower {self._rate_key()} in the --hyp file"
        )

    def _kept(self) -> str:
        last = self._file("last")
        return f"{last} is that of the epoch before" if last.exists() else "there is no checkpoint yet"

    def _rate_key(self) -> str:
        return "quant_lr0" if self.phase.quantized else "lr0"

    def _check_agreement(self, epoch: int) -> None:
        """Raises UserError unless all processes have the same weights, quantizers and balance, bit for bit."""
        if not distributed.is_active():
            return
        state = dict(self.model.named_parameters())
        state |= {f"average of {name}": parameter for name, parameter in self.ema.ema.named_parameters()}
        stateful = {**quantizers(self.model), **fusion_nodes(self.model)}
        for name, module in stateful.items():
            kept = set(module.state_dict())
            state |= {f"{name}.{key}": value for key, value in module.named_buffers() if key in kept}
        distributed.check_equal(state, f"after epoch {epoch + 1} of the {self.phase.name} phase")

    def _begin_correction(self, epoch: int) -> None:
        """The averaged network, with statistics of its own, becomes the one that is trained on."""
        LOGGER.info("Correction: only the gains and shifts of batch norms learn from here on")
        self.run.reestimate_norms(self.ema.ema, epoch - 1 + QUANTIZED_EPOCHS)
        distributed.copy_from_main(self.ema.ema)
        self.model.load_state_dict(self.ema.ema.state_dict())
        self._set_up_correction()

    def _set_up_correction(self) -> None:
        """Gains and shifts before a batch norm, as in the paper, are gains and shifts of the batch norm itself."""
        learning = []
        for module in self.model.modules():
            norm = isinstance(module, _BatchNorm)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(norm and parameter.requires_grad)
                learning += [parameter] if parameter.requires_grad else []
        if not learning:
            raise UserError("batch_norm.correction: the network has no batch norm that may learn; leave it out")
        rate = self.hyp["correction_lr"]
        self.optimizer = torch.optim.Adam(learning, lr=rate, fused=self.run.device.type in ("cpu", "cuda"))
        self.optimizer.param_groups[0]["initial_lr"] = rate
        self.ema = ModelEMA(self.ema.ema, self.hyp["ema_decay"], self.hyp["ema_tau"])
        self.quantized.average = self.ema.ema
        self.parallel = self._distribute()

    def _finetune(self) -> None:
        """The paper's end (``fold: finetune``): constants for the statistics, then one epoch of Adam at 2e-5."""
        LOGGER.info("Fusion statistics become constants; fine-tuning one epoch")
        self.quantized.fix_statistics(self.run.calibration_batches())
        # The constants are fitted to these weights, not to an average. Model and average are equal now; of the two the
        # average never has synchronised batch norms.
        self.ema = ModelEMA(self.ema.ema, decay=0.0)
        self.quantized.average = self.ema.ema
        self.parallel = self._distribute()  # anew, as the readers' steps have stopped learning
        rate = self.hyp["finetune_lr"]
        self.optimizer = build_optimizer(self.model, "Adam", rate, 0.9, 0.0, rate)
        idle = Warmup(self.optimizer, 0, 0.0, 0.9, 0.9, self.options.batch_size, self.hyp["nominal_batch"])
        self.model.train()
        started = time.perf_counter()
        epochs = self.phase.epochs
        parts = self._train_epoch(epochs, idle)
        speed = len(self.run.train_set) / (time.perf_counter() - started)
        result = self._evaluate(epochs, plots=True)
        self._finish_epoch(epochs, parts, [rate] * 3, result, speed)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        return self.run.weights_dir / f"{self.phase.prefix}{name}.pt"

    def _save(self, checkpoint: dict, name: str) -> None:
        if distributed.is_main():
            save_checkpoint(checkpoint, self._file(name))

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
            "term_weights": self.quantized.term_weights if self.quantized else None,
            "weights_fitted": self.quantized.weights_fitted if self.quantized else None,
            "stopped": self.stopped,
            "calibrated": self.calibrated,
            "class_maps": self.class_maps.tolist(),
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
        if self.correction_start <= checkpoint["epoch"] < self.phase.epochs:
            self._set_up_correction()
        self.ema.updates = checkpoint["ema_updates"]
        if checkpoint["epoch"] < self.phase.epochs:  # else it has the optimizer of the fine-tuning behind the epochs
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.stopper.load_state_dict(checkpoint["stopper"])
        self.best_fitness = checkpoint["best_fitness"]
        self.calibrated = checkpoint.get("calibrated")
        self.class_maps = np.array(checkpoint.get("class_maps", self.class_maps))
        if self.quantized:
            self.quantized.first_steps = checkpoint["first_steps"]
            self.quantized.term_weights = checkpoint.get("term_weights") or self.quantized.term_weights
            self.quantized.weights_fitted = checkpoint.get("weights_fitted", True)
        self.stopped = checkpoint.get("stopped", False)
        self.first_epoch = checkpoint["epoch"] + 1
        restore_random_states(checkpoint["random"])
        LOGGER.info(f"Resuming the {self.phase.name} phase at epoch {self.first_epoch + 1}/{self.phase.epochs}")

    def _finalise(self) -> None:
        """Drops what only resuming needs from the finished phase's checkpoints."""
        for name in ("best", "last"):  # killed between the two, the run still counts as unfinished and comes here again
            file = self._file(name)
            if file.exists():
                checkpoint = load_checkpoint(file)
                checkpoint |= {"model": None, "optimizer": None, "scaler": None, "random": None, "finished": True}
                save_checkpoint(checkpoint, file)
