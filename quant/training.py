"""What the quantized phase adds to a training loop: the fusion schedule, ADA, gradient balance, and their monitors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.yolo import DetectionModel
from quant.ada import AttentionAlignment, freeze_teacher
from quant.config import QuantConfig
from quant.gabfusion import GABFusion, calibrate_fusion, fusion_nodes, set_strength, strength_at
from quant.prepare import fusion_readers, quantizers, reading_quantizers
from utils.errors import UserError
from utils.log import LOGGER

FACTOR_LIMITS = (0.1, 1.9)  # of K * alpha: outside, one branch has been switched off
RATIO_LIMITS = (0.001, 1.0)  # of ADA's gradient to the task's
COLLAPSED_STEP = 0.02  # share of its first value at which a step has collapsed
DEAD_OBJECTNESS = 0.01  # largest objectness of a whole batch


class QuantizedTraining:
    """Companion of the trainer during quantized epochs.

    Args:
        model: the prepared network in training.
        average: the network whose weights are averaged (EMA), prepared alike.
        config: the quantization.
        teacher: float network for ADA; frozen here. Needed only with ``config.ada.enabled``.
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
        self._ada_sum: Tensor | float = 0.0
        self._ada_count = 0
        self.gradient_ratio: float | None = None
        self._warned: set[str] = set()
        if self.nodes:
            fusion_readers(model)  # refuses now what could not be folded later
        if config.ada.enabled:
            self._set_up_distillation(teacher)

    def _set_up_distillation(self, teacher: nn.Module | None) -> None:
        if teacher is None:
            raise UserError("--ada needs a float teacher: give --teacher FILE, or let the float phase train one")
        ada = self.config.ada
        self.teacher = freeze_teacher(teacher)
        self.features = tuple(ada.layers or self.model.feature_layers)
        last = self.model.detect.i
        wrong = [index for index in self.features if not 0 <= index < last]
        if wrong:
            raise UserError(f"ada.layers: {wrong[0]} is not a layer of this model; its layers are 0 to {last - 1}")
        names = {index: f"model.{index}" for index in self.features}
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

    # --- schedule ---------------------------------------------------------------------------------------------------

    def set_progress(self, progress: float) -> None:
        """Sets the fusion strength for ``progress`` (0..1) of the quantized epochs."""
        fusion = self.config.gabfusion
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

    def distillation(self, images: Tensor, features: dict[int, Tensor]) -> Tensor:
        """ADA's loss for one batch, weighted, times the batch size (as the task loss is).

        Args:
            images: (B, 3, H, W), 0 to 1, as the student saw them.
            features: the student's outputs of ``self.features``.
        """
        with torch.no_grad():
            _, teacher_features = self.teacher(images, features=self.features)
        divergence = self.alignment(features, teacher_features, self.readers)
        self._ada_sum = self._ada_sum + divergence.detach()
        self._ada_count += 1
        return divergence * (self.config.ada.weight * images.shape[0])

    def measure_ratio(self, task_loss: Tensor, distillation_loss: Tensor, features: dict[int, Tensor]) -> None:
        """Ratio of the two losses' gradient norms at the distilled features (a second, partial backward pass)."""
        tensors = list(features.values())
        norms = []
        for loss in (distillation_loss, task_loss):
            gradients = torch.autograd.grad(loss, tensors, retain_graph=True)
            norms.append(torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in gradients]).norm())
        self.gradient_ratio = float(norms[0] / norms[1].clamp_min(1e-12))

    def after_backward(self, gradient_scale: float = 1.0) -> None:
        """One controller update at every fusion node; call it once per optimizer step that is not skipped."""
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
        if self.teacher is not None:
            names += ["quant/ada_loss", "quant/ada_gradient_ratio"]
        return tuple(names)

    def end_epoch(self, largest_objectness: float) -> dict[str, float]:
        """Logs and returns the epoch's values, and warns of what goes wrong."""
        values: dict[str, float] = {"quant/deployable": float(self.deployable)}
        for name, node in self.nodes.items():
            values |= self._describe_node(name, node)
        if self.nodes:
            values["quant/strength"] = self.strength
        if self.teacher is not None and self._ada_count:
            values["quant/ada_loss"] = float(self._ada_sum / self._ada_count)
            values["quant/ada_gradient_ratio"] = self.gradient_ratio or 0.0
            LOGGER.info(
                f"  ada loss {values['quant/ada_loss']:.4g} nat, gradient "
                f"{values['quant/ada_gradient_ratio']:.1%} of the task's at layers {list(self.features)}"
            )
            self._check_ratio(values["quant/ada_gradient_ratio"])
            self._ada_sum, self._ada_count = 0.0, 0
        self._check_steps()
        if largest_objectness < DEAD_OBJECTNESS:
            self._warn(
                "objectness",
                f"the objectness output is dying: its largest value in a batch is {largest_objectness:.4f}. Lower "
                "quant_lr0, or raise detect_bits",
            )
        return values

    def _describe_node(self, name: str, node: GABFusion) -> dict[str, float]:
        factors, energies = node.factors().tolist(), node.energy_average.tolist()
        LOGGER.info(
            f"  {name}: alpha {' : '.join(f'{f / (1 if node.paper else node.branches):.3f}' for f in factors)}, "
            f"gradient norms {' : '.join(f'{e:.3g}' for e in energies)}, strength {self.strength:.2f}"
        )
        scale = node.branches if node.paper else 1
        if any(not FACTOR_LIMITS[0] <= factor * scale <= FACTOR_LIMITS[1] for factor in factors):
            self._warn(
                name,
                f"{name}: a branch factor K * alpha has left {list(FACTOR_LIMITS)} ({factors}); one branch is being "
                "switched off. Lower gabfusion.eta (feedback) or gabfusion.learning_rate (learnable)",
            )
        return {f"{name}/factor{i}": f for i, f in enumerate(factors)} | {
            f"{name}/gradient{i}": e for i, e in enumerate(energies)
        }

    def _check_ratio(self, ratio: float) -> None:
        if not RATIO_LIMITS[0] <= ratio <= RATIO_LIMITS[1]:
            effect = "does nothing" if ratio < RATIO_LIMITS[0] else "outweighs the task"
            change = "raise" if ratio < RATIO_LIMITS[0] else "lower"
            self._warn("ada", f"ADA {effect}: its gradient is {ratio:.2%} of the task's; {change} ada.weight")

    def _check_steps(self) -> None:
        found = quantizers(self.model)
        ratios = torch.stack([found[n].current_step().detach().mean() / first for n, first in self.first_steps.items()])
        for name, ratio in zip(self.first_steps, ratios.tolist(), strict=True):
            if ratio < COLLAPSED_STEP:
                self._warn(
                    name,
                    f"{name}: the step has collapsed to {ratio:.2%} of its first value; lower quant_parameter_lr",
                )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            LOGGER.warning(f"WARNING: {message}")

    def branch_factors_inert(self) -> bool:
        """Whether no learned branch factor has moved by 0.02 or more."""
        factors = torch.cat([node.factors() * (node.branches if node.paper else 1) for node in self.nodes.values()])
        return bool((factors - 1).abs().max() < 0.02)


def calibration_batches(dataset, images: int, device: torch.device, batch_size: int = 16) -> list[Tensor]:
    """Evenly spaced images of ``dataset`` (letterboxed, not augmented) as float batches (B, 3, H, W), 0 to 1."""
    count = min(images, len(dataset))
    chosen = [round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)]
    batches = []
    for first in range(0, count, batch_size):
        stacked = torch.stack([dataset[index][0] for index in chosen[first : first + batch_size]])
        batches.append(stacked.to(device).float() / 255)
    return batches
