"""Monitors of the quantized phase: what is known to go wrong, recognised in time. Each message says what to change.

The signatures are those of GABFusion and ADA at work (a node where nothing can be balanced, a normalisation over the
wrong axis, branch weights that collapse or never move, a distillation that does nothing or takes over, boxes that get
worse while classes do not, statistics that jump) and of quantization (steps that collapse or explode, ranges from
constants, dying objectness).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.gabfusion import GABFusion
from quant.prepare import example_input, quantizers
from quant.trace import trace_flow
from utils.log import LOGGER

FACTOR_LIMITS = (0.1, 1.9)  # of K * alpha: outside, one branch has been switched off
INERT_FACTOR = 0.02  # largest |K * alpha - 1| at which alpha has done nothing
RATIO_LIMITS = (0.001, 1.0)  # of a distillation's gradient to the task's
STEP_LIMITS = (0.02, 50.0)  # of a step to its first value: it has collapsed or exploded
CONSTANT_STEP = 1e-6  # an activation step this small was calibrated on values that do not vary
DEAD_OBJECTNESS = 0.01  # largest objectness of a whole batch
AXIS_ERROR = 0.05  # mean over channels behind the normalisation, in deviations; 1e-6 where the axis is right
DEVIATION_SPREAD = 2.0  # largest over smallest s of an epoch's batches
DEVIATION_DRIFT = 3.0  # of s to the calibrated s0
BOX_RISE, CLASS_RISE = 1.05, 1.02  # of validation losses over their best
BOX_EPOCHS = 2  # in a row, since a single validation jumps by a few percent


class Monitors:
    """Warns, once for each cause.

    Args:
        model: the prepared network in training.
        nodes: its fusion modules by name.
    """

    def __init__(self, model: nn.Module, nodes: dict[str, GABFusion]) -> None:
        self.model, self.nodes = model, nodes
        self._warned: set[str] = set()
        self._best_losses: list[float] | None = None  # box, class
        self._box_epochs = 0
        self.check_nodes()

    def warn(self, key: str, message: str) -> None:
        """Logs ``message`` unless ``key`` has been warned of."""
        if key not in self._warned:
            self._warned.add(key)
            LOGGER.warning(f"WARNING: {message}")

    def check_nodes(self) -> None:
        """Warns of fusion nodes whose branches are copies of one tensor."""
        if not self.nodes:
            return
        flow = trace_flow(self.model, example_input(self.model))
        for name in self.nodes:
            if flow.copies_of_one(name):
                self.warn(
                    f"{name} copies",
                    f"{name}: all branches are pooled copies of one tensor (as in an SPPF), so there is nothing to "
                    "balance and the normalisation only takes scale away. Take GABFusion out of this node; "
                    "gabfusion.scope: neck or all never puts it there",
                )

    def check_fusion(self, balance: str, finished: bool) -> None:
        """Checks branch factors and statistics, once an epoch.

        Args:
            balance: ``gabfusion.balance``.
            finished: whether this was the last epoch.
        """
        for name, node in self.nodes.items():
            scale = node.branches if node.paper else 1
            factors = [factor * scale for factor in node.factors().tolist()]
            if any(not FACTOR_LIMITS[0] <= factor <= FACTOR_LIMITS[1] * node.branches / 2 for factor in factors):
                self.warn(
                    name,
                    f"{name}: a branch factor K * alpha has left its range ({[round(f, 3) for f in factors]}); one "
                    "branch is being switched off. Lower gabfusion.eta (feedback) or gabfusion.learning_rate "
                    "(learnable)",
                )
            self._check_statistics(name, node)
            node.clear_monitors()
        if finished and self.nodes and balance not in ("fixed", "backward") and self.inert(balance):
            self.warn(
                "inert",
                f"GABFusion: every branch factor K * alpha stayed within {INERT_FACTOR} of 1, so alpha did nothing. "
                + (
                    "Raise gabfusion.learning_rate"
                    if balance == "learnable"
                    else "The gradients were balanced already, or gabfusion.eta is too small"
                )
                + "; or leave GABFusion out",
            )

    def inert(self, balance: str) -> bool:
        """Whether no branch factor that could move has moved by 0.02 or more."""
        nodes = [node for node in self.nodes.values() if balance != "feedback" or node.operation == "concat"]
        factors = [node.factors() * (node.branches if node.paper else 1) for node in nodes]
        return bool(factors) and bool((torch.cat(factors) - 1).abs().max() < INERT_FACTOR)

    def _check_statistics(self, name: str, node: GABFusion) -> None:
        low, high = node.deviation_range.tolist()
        if high == 0.0:  # not normalised in this epoch
            return
        calibrated = float(node.deviation)
        drift = max(high / calibrated, calibrated / max(low, 1e-12))
        if high > DEVIATION_SPREAD * low:
            self.warn(
                f"{name} statistics",
                f"{name}: the statistics of the normalisation are unstable: the deviation over channels went from "
                f"{low:.3g} to {high:.3g} within an epoch. Constants cannot stand for it: keep gabfusion.fold: anneal, "
                "and lower quant_lr0 or raise quant_warmup_epochs",
            )
        elif not node.paper and drift > DEVIATION_DRIFT:
            self.warn(
                f"{name} statistics",
                f"{name}: the statistics of the normalisation are unstable: the deviation over channels is "
                f"{(low + high) / 2:.3g} in training and was {calibrated:.3g} at calibration. Train the float model "
                "longer if its batch norms have not settled, calibrate on more images (calibration.images), or lower "
                "quant_lr0",
            )
        if float(node.axis_error) > AXIS_ERROR:
            self.warn(
                f"{name} axis",
                f"{name}: behind the normalisation the mean over channels is off by {float(node.axis_error):.2f} "
                "deviations: the statistics are not taken over the channel axis. Take them over dimension 1 of "
                "(B, C, H, W), for each location by itself (a LayerNorm needs the tensor as (B, H, W, C))",
            )

    def check_ratios(self, ratios: dict[str, float], weights: dict[str, str]) -> None:
        """Checks gradient ratios.

        Args:
            ratios: name of a loss -> norm of its gradient over that of the task.
            weights: name of a loss -> recipe key of its weight.
        """
        for name, ratio in ratios.items():
            if not RATIO_LIMITS[0] <= ratio <= RATIO_LIMITS[1]:
                weak = ratio < RATIO_LIMITS[0]
                effect, change = ("does nothing", "raise") if weak else ("outweighs the task", "lower")
                self.warn(
                    name,
                    f"{name} {effect}: its gradient is {ratio:.2%} of the task's; {change} {weights[name]}",
                )

    def check_steps(self, first_steps: dict[str, Tensor]) -> None:
        """Compares mean steps with ``first_steps`` (quantizer name -> scalar)."""
        found = quantizers(self.model)
        ratios = torch.stack([found[n].current_step().detach().mean() / first for n, first in first_steps.items()])
        for name, ratio in zip(first_steps, ratios.tolist(), strict=True):
            if not STEP_LIMITS[0] <= ratio <= STEP_LIMITS[1]:
                change = "collapsed" if ratio < 1 else "exploded"
                self.warn(
                    name, f"{name}: the step has {change} to {ratio:.2%} of its first value; lower quant_parameter_lr"
                )

    def check_calibration(self, first_steps: dict[str, Tensor]) -> None:
        """Warns of activation ranges that were set from values that do not vary."""
        found = quantizers(self.model)
        names = [name for name in first_steps if found[name].channels is None and not name.endswith("weight_quantizer")]
        steps = torch.stack([first_steps[name] for name in names]).tolist() if names else []
        constant = [
            f"{name} (step {step:.1e})"
            for name, step in zip(names, steps, strict=True)
            if step < CONSTANT_STEP and bool(found[name].initialised)
        ]
        if constant:
            more = f" and {len(constant) - 3} more" if len(constant) > 3 else ""
            self.warn(
                "constant",
                f"{', '.join(constant[:3])}{more}: range set from values that do not vary. Calibrate on images of the "
                "task, or look for dead layers in the float model",
            )

    def check_objectness(self, largest: float) -> None:
        """``largest``: the largest objectness of a batch, 0 to 1."""
        if largest < DEAD_OBJECTNESS:
            self.warn(
                "objectness",
                f"the objectness output is dying: its largest value in a batch is {largest:.4f}. Lower quant_lr0, or "
                "raise detect_bits",
            )

    def check_regression(self, box: float, classification: float) -> None:
        """Takes one epoch's validation losses; they are 0 where there was no validation or is only one class."""
        if box <= 0 or classification <= 0:
            return
        best = self._best_losses or [box, classification]
        degraded = box > BOX_RISE * best[0] and classification <= CLASS_RISE * best[1]
        self._box_epochs = self._box_epochs + 1 if degraded else 0
        self._best_losses = [min(best[0], box), min(best[1], classification)]
        if self._box_epochs >= BOX_EPOCHS:
            self.warn(
                "regression",
                f"box regression degrades while classification holds: validation box loss {best[0]:.4f} -> {box:.4f}, "
                f"class loss {best[1]:.4f} -> {classification:.4f}. Boxes need finer steps: raise activation_bits of "
                "the layers that feed Detect (layers:), keep detect_bits at 8, use --gabfusion, or raise box in the "
                "hyperparameters",
            )
