"""What the quantized phase adds to a training loop: fusion schedule, distillation, gradient balance, penalties.

All distillation, ADA's and that of ``quant.distillation``, comes from one forward pass of one frozen teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.yolo import DetectionModel
from quant.ada import AttentionAlignment, freeze_teacher
from quant.config import QuantConfig
from quant.dampening import dampening, dampening_factor
from quant.distillation import distillation_losses
from quant.gabfusion import GABFusion, calibrate_fusion, fusion_nodes, set_strength, share_energies, strength_at
from quant.monitors import Monitors
from quant.prepare import fusion_readers, penalty, quantizers, reading_quantizers
from quant.samples import labelled_batches
from utils import distributed
from utils.errors import UserError
from utils.log import LOGGER

RATIO_MEASUREMENTS = 16  # an epoch, where a distillation weight follows a gradient ratio
RATIO_STEP = 1.5
WEIGHT_RANGE = 100.0  # at 4 and 3 bits weights moved by 7 to 34 times


class QuantizedTraining:
    """Companion of the trainer during quantized epochs.

    Args:
        model: the prepared network in training.
        average: the network whose weights are averaged (EMA), prepared alike.
        config: the quantization.
        teacher: float network to learn from; frozen here. Needed only with ``config.needs_teacher``.
        epochs: number of quantized epochs.
    """

    def __init__(
        self,
        model: DetectionModel,
        average: DetectionModel,
        config: QuantConfig,
        teacher: nn.Module | None,
        epochs: int,
    ) -> None:
        self.model, self.average, self.config, self.epochs = model, average, config, max(epochs, 1)
        self.nodes = fusion_nodes(model)
        self.strength = 0.0
        self.features: tuple[int, ...] = ()
        self.teacher: nn.Module | None = None
        self.first_steps = {name: q.current_step().detach().mean() for name, q in quantizers(model).items()}
        self.progress = 0.0
        self.term_weights: dict[str, float] = {}  # distillation term -> weight
        self.target_ratios: dict[str, float] = {}  # distillation term -> share of the task's gradient it is to have
        self.weights_fitted = False  # whether these ratios have been measured once
        self._term_sums: dict[str, Tensor] = {}
        self._term_count = 0
        self.gradient_ratios: dict[str, float] = {}
        self._penalised = any(q.penalty() is not None for q in quantizers(model).values())
        if self.nodes and config.gabfusion.fold == "finetune":
            fusion_readers(model)  # refuses now what could not be fixed later
        if config.needs_teacher:
            self._set_up_distillation(teacher)
        self.monitors = Monitors(model, self.nodes)
        self.monitors.check_calibration(self.first_steps)

    def _set_up_distillation(self, teacher: nn.Module | None) -> None:
        if teacher is None:
            raise UserError(
                "--ada and distillation need a float teacher: give --teacher FILE, let the float phase train one, or "
                "switch them off (in a recipe: distillation: false)"
            )
        ada, other = self.config.ada, self.config.distillation
        self.teacher = freeze_teacher(teacher)
        self.term_weights = ({"ada": ada.weight} if ada.enabled else {}) | other.weights
        self.given_weights = dict(self.term_weights)
        ratios = dict.fromkeys(other.weights, other.gradient_ratio)
        ratios["ada"] = ada.gradient_ratio if ada.enabled else 0.0
        self.target_ratios = {name: ratio for name, ratio in ratios.items() if ratio}
        # Without features of its own a term is still measured where Detect reads.
        self.ada_layers = self._layers(ada.layers) if ada.enabled else ()
        self.layers = self._layers(other.layers) if other.weights else ()
        self.features = tuple(sorted({*self.ada_layers, *self.layers}))
        names = {index: f"model.{index}" for index in self.ada_layers}
        reading = reading_quantizers(self.model, list(names.values()))
        self.readers = {index: (reading[name] or [None])[0] for index, name in names.items()}
        self.alignment = AttentionAlignment(
            ada.attention,
            self.config.resolved_divergence(),
            ada.normalisation,
            ada.temperature,
            ada.saliency_gamma,
            ada.quantized,
        )

    def _layers(self, given: list[int] | None) -> tuple[int, ...]:
        self.config.check_layers(self.model.detect.i)
        return tuple(given or self.model.feature_layers)

    # --- schedule ---------------------------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        """Sets the fusion strength for ``progress`` (0..1) of the quantized epochs."""
        fusion = self.config.gabfusion
        self.progress = progress
        if not self.nodes:
            return
        if fusion.paper:
            strength = 1.0
        elif fusion.fold == "anneal":
            strength = strength_at(progress, fusion.ramp, fusion.hold, fusion.release)
        else:
            strength = min(progress / fusion.ramp, 1.0) if fusion.ramp else 1.0
        if strength != self.strength or progress == 0:
            self.strength = strength
            for network in (self.model, self.average):
                set_strength(network, strength)

    @property
    def deployable(self) -> bool:
        """Whether the present network can be exported as it is: only then may it become best.pt."""
        if not self.nodes:
            return True
        if self.config.gabfusion.fold == "keep":
            return self.strength == 1.0
        return all(node.is_identity for node in self.nodes.values())

    def fix_statistics(self, batches: list[Tensor]) -> None:
        """``fold: finetune``: puts constants for the statistics of the averaged network and loads it for fine-tuning.

        The shift is snapped to steps of the reading quantizers, so those stop learning here.
        """
        steps = {name: reader.current_step().detach() for name, reader in fusion_readers(self.average).items()}
        self.average.eval()
        calibrate_fusion(self.average, batches, fix=steps)
        self.model.load_state_dict(self.average.state_dict())
        for reader in fusion_readers(self.model).values():
            for parameter in reader.parameters():
                parameter.requires_grad_(False)
        self.features = ()  # the paper fine-tunes without distillation

    # --- one step ---------------------------------------------------------------------------------------------------

    def set_probe(self, probe: bool) -> None:
        """Whether the fusion nodes measure the next forward pass for the monitors."""
        for node in self.nodes.values():
            node.probe = probe

    def penalty(self, batch_size: int) -> Tensor | None:
        """The quantizers' own loss terms (PACT's L2) and the weights' dampening, times the batch size, or None without
        either."""
        total = penalty(self.model) if self._penalised else None
        factor = dampening_factor(self.progress, self.config.weight.dampening)
        if factor:
            term = factor * dampening(self.model)
            total = term if total is None else total + term
        return None if total is None else total * batch_size

    def distillation(self, images: Tensor, features: dict[int, Tensor], raw: list[Tensor]) -> dict[str, Tensor]:
        """The distillation losses of one batch by name, weighted, times the batch size (as the task loss is).

        Args:
            images: (B, 3, H, W), 0 to 1, as the student saw them.
            features: the student's outputs of ``self.features``.
            raw: the student's raw maps, one a level.
        """
        with torch.no_grad():
            (_, teacher_raw), teacher_features = self.teacher(images, features=self.features)
        other = self.config.distillation
        losses = {}
        if self.ada_layers:
            chosen = {index: features[index] for index in self.ada_layers}
            losses["ada"] = self.alignment(chosen, teacher_features, self.readers)
        losses |= distillation_losses(
            list(other.weights), {index: features[index] for index in self.layers}, teacher_features, raw, teacher_raw,
            other.temperature, (self.model.detect.anchors, self.teacher.detect.anchors),
        )  # fmt: skip
        for name, loss in losses.items():
            self._term_sums[name] = self._term_sums.get(name, 0.0) + loss.detach()
        self._term_count += 1
        return {name: loss * (self.term_weights[name] * images.shape[0]) for name, loss in losses.items()}

    def measures(self, index: int, batches: int) -> bool:
        """Whether the gradients of batch ``index`` of an epoch's ``batches`` are to be compared: in the middle, and
        where weights follow them before the first step and ``RATIO_MEASUREMENTS`` times an epoch."""
        every = max(batches // RATIO_MEASUREMENTS, 1) if self.target_ratios else batches
        fits = bool(self.target_ratios) and (not self.weights_fitted or index % every == 0)
        return fits or index == batches // 2

    def fit_weights(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Moves the weights of terms with a ``gradient_ratio`` by the ratios just measured, and ``losses`` with them.

        The first time a weight goes where it has to be, later at most by ``RATIO_STEP`` at once: one batch's gradients
        are noisy. It stays within a factor of ``WEIGHT_RANGE`` of the given one, so that a network that agrees with its
        teacher already (8 bits) is not driven by what is left of the difference.
        """
        for name, target in self.target_ratios.items():
            ratio = self.gradient_ratios[name]
            if not 0 < ratio < math.inf:  # nothing to learn in this batch, or float16 has under- or overflown
                continue
            change = target / ratio
            if self.weights_fitted:
                change = min(max(change, 1 / RATIO_STEP), RATIO_STEP)
            given, weight = self.given_weights[name], self.term_weights[name]
            change = min(max(weight * change, given / WEIGHT_RANGE), given * WEIGHT_RANGE) / weight
            self.term_weights[name] *= change
            self.gradient_ratios[name] *= change
            losses = {**losses, name: losses[name] * change}
        self.weights_fitted = True
        return losses

    def measure_ratios(self, task_loss: Tensor, losses: dict[str, Tensor], features: dict[int, Tensor]) -> None:
        """Ratio of each loss's gradient norm at the features to the task's (one partial backward pass each)."""
        tensors = list(features.values())

        def norm(loss: Tensor) -> Tensor:
            gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
            found = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients if gradient is not None]
            return distributed.total(torch.stack(found).square().sum()).sqrt()

        task = norm(task_loss).clamp_min(1e-12)
        self.gradient_ratios = {name: float(norm(loss) / task) for name, loss in losses.items()}

    def after_backward(self, gradient_scale: Tensor | float = 1.0) -> None:
        """One controller update at every fusion node; call it once per optimizer step, with the loss scale."""
        share_energies(self.nodes.values())
        for node in self.nodes.values():
            node.update_balance(gradient_scale)

    # --- reporting --------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the values that ``end_epoch`` returns."""
        names = ["quant/deployable"]
        for node in self.nodes:
            branches = range(self.nodes[node].branches)
            names += [f"{node}/factor{i}" for i in branches] + [f"{node}/gradient{i}" for i in branches]
        if self.nodes:
            names.append("quant/strength")
        for name in self.term_weights:
            names += [f"quant/{name}_loss", f"quant/{name}_gradient_ratio"]
        return tuple(names)

    def end_epoch(self, largest_objectness: float, values: dict[str, float] | None = None) -> dict[str, float]:
        """Logs and returns the epoch's values, and warns of what goes wrong.

        Args:
            largest_objectness: of one batch, 0 to 1.
            values: the epoch's validation losses under their names in results.csv, where there was a validation.
        """
        found: dict[str, float] = {"quant/deployable": float(self.deployable)}
        for name, node in self.nodes.items():
            found |= self._describe_node(name, node)
        if self.nodes:
            found["quant/strength"] = self.strength
        found |= self._describe_distillation()
        monitors, values = self.monitors, values or {}
        monitors.check_fusion(self.config.gabfusion.balance, self.progress >= 1)
        monitors.check_steps(self.first_steps)
        monitors.check_objectness(largest_objectness)
        monitors.check_regression(values.get("val/box_loss", 0.0), values.get("val/cls_loss", 0.0))
        return found

    def mean_steps(self) -> dict[str, float]:
        """The mean step of every quantizer, for TensorBoard: ``steps/<name of the quantizer>``."""
        steps = {name: q.current_step().detach().mean() for name, q in quantizers(self.model).items()}
        return {
            f"steps/{name}": value
            for name, value in zip(steps, torch.stack(list(steps.values())).tolist(), strict=True)
        }

    def _describe_distillation(self) -> dict[str, float]:
        if not self._term_count:
            return {}
        found = {}
        for name in self.term_weights:
            loss = float(distributed.mean(self._term_sums[name] / self._term_count))
            ratio = self.gradient_ratios.get(name, 0.0)
            found |= {f"quant/{name}_loss": loss, f"quant/{name}_gradient_ratio": ratio}
            at = f"at layers {list(self.features)}"
            LOGGER.debug(f"  {name} loss {loss:.4g}, gradient {ratio:.1%} of the task's {at}")
        keys = {name: "ada.weight" if name == "ada" else f"distillation.{name}" for name in self.term_weights}
        given = {name: ratio for name, ratio in self.gradient_ratios.items() if name not in self.target_ratios}
        self.monitors.check_ratios(given, keys)
        self._term_sums, self._term_count = {}, 0
        return found

    def _describe_node(self, name: str, node: GABFusion) -> dict[str, float]:
        factors, energies = node.factors().tolist(), node.energy_average.tolist()
        LOGGER.debug(
            f"  {name}: alpha {' : '.join(f'{f / (1 if node.paper else node.branches):.3f}' for f in factors)}, "
            f"gradient norms {' : '.join(f'{e:.3g}' for e in energies)}, strength {self.strength:.2f}"
        )
        return {f"{name}/factor{i}": f for i, f in enumerate(factors)} | {
            f"{name}/gradient{i}": e for i, e in enumerate(energies)
        }


def calibration_batches(dataset, images: int, device: torch.device, batch_size: int = 16) -> list[Tensor]:
    """Evenly spaced images of ``dataset`` (letterboxed, not augmented) as float batches (B, 3, H, W), 0 to 1."""
    return [batch for batch, _ in labelled_batches(dataset, images, device, batch_size)]
