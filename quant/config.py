"""The quantization configuration: dataclasses and their YAML form. ``quant.recipe`` merges flags and files into one."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from quant.quantizer import MethodOptions
from quant.ranges import RULES
from quant.registry import QUANTIZERS
from utils.errors import UserError

BITS = tuple(range(2, 9))
BALANCES = ("learnable", "feedback", "backward", "fixed")
DIVERGENCES = ("auto", "js", "kl")
AUTO_COSTS = ("parameters", "bops")


def _choice(where: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise UserError(f"{where}: {value!r} is not possible; choose one of {', '.join(str(a) for a in allowed)}")


def check_bits(where: str, value: Any) -> None:
    """Raises UserError naming ``where`` unless ``value`` is a number of bits."""
    _choice(where, value, BITS)


def _number(where: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{where}: {value!r} is not a number from {low:g} to {high:g}")


def _layer_numbers(where: str, value: Any) -> None:
    if value is not None and not (isinstance(value, list) and all(isinstance(index, int) for index in value)):
        raise UserError(f"{where}: {value!r} is not a list of layer numbers")


@dataclass
class WeightConfig:
    """How weights are quantized: always symmetric, on the narrow grid ``+-(2**(bits-1) - 1)``.

    Attributes:
        bits: 2 to 8.
        granularity: a step for each output ``channel``, or one for the whole ``tensor``.
        dampening: largest factor of the loss that draws weights to the middle of their codes (``quant.dampening``); the
            paper has 0.1, 0 leaves it out.
    """

    bits: int = 4
    granularity: str = "channel"
    dampening: float = 0.0

    def validate(self, where: str) -> None:
        _choice(f"{where}.bits", self.bits, BITS)
        _choice(f"{where}.granularity", self.granularity, ("channel", "tensor"))
        _number(f"{where}.dampening", self.dampening, 0, 1e6)


@dataclass
class ActivationConfig:
    """How the inputs of convolutions are quantized.

    Attributes:
        bits: 2 to 8.
        scheme: ``affine`` learns an integer zero point, ``unsigned`` is the papers' grid (negative values become 0),
            ``signed`` has its zero point fixed at 0; ``auto``: signed for tensorrt, else affine.
        output: bits of a quantizer on the result of every convolution, in front of the activation function; 8 is what
            it is meant for, None leaves it out. onnxruntime runs convolutions in integers only with it.
        image: the 8-bit grid of the network's input: ``fixed`` for values 0 to 1, ``learned`` for any others.
        equalization: how much of the differences between an input's channels the weights take over, 0 to 1; 0: none.
            See ``quant.equalize``. Not with ``output``, for TensorRT, or with a GABFusion whose normalisation stays.
    """

    bits: int = 4
    scheme: str = "auto"
    output: int | None = None
    image: str = "fixed"
    equalization: float = 0.5

    def validate(self, where: str) -> None:
        _choice(f"{where}.bits", self.bits, BITS)
        _choice(f"{where}.scheme", self.scheme, ("auto", "affine", "unsigned", "signed"))
        _choice(f"{where}.output", self.output, (None, *BITS))
        _choice(f"{where}.image", self.image, ("fixed", "learned"))
        _number(f"{where}.equalization", self.equalization, 0, 1)
        if self.output is not None and self.scheme == "signed":
            raise UserError(
                f"{where}: output needs inputs without a sign (onnxruntime's integer convolution reads and writes "
                "uint8); set scheme to affine or unsigned, or leave output out"
            )


@dataclass
class CalibrationConfig:
    """First ranges, which training then moves.

    Attributes:
        images: training images, letterboxed as in validation, over which ranges are searched.
        range: of activations: ``mse``, that of the smallest mean squared error; ``percentile``, all but the outermost
            0.1 % of the values on each side; ``max``, all values. Weights have ``mse``, ``paper`` its own.
    """

    images: int = 64
    range: str = "mse"

    def validate(self, where: str) -> None:
        _choice(f"{where}.range", self.range, RULES)
        _number(f"{where}.images", self.images, 1, 100000)


@dataclass
class FusionConfig:
    """GABFusion at the Concats of the neck (arXiv 2511.05898); see ``quant.gabfusion``.

    Attributes:
        enabled: insert it; ``gabfusion: true`` or ``gabfusion: feedback`` for short.
        scope: ``neck``, the Concats and Adds of the network's own rows; ``all``, those inside C3 and other blocks too.
        balance: ``learnable`` trains the branch weights, ``feedback`` moves them by gradient energies, ``backward``
            scales the branches' gradients instead and leaves the forward pass alone, ``fixed`` keeps the weights at 1.
        fold: ``anneal`` fades the normalisation out during training, ``finetune`` replaces its statistics by constants
            and trains a little more, ``keep`` leaves it in the exported graph.
        paper: the paper's form (no factor K, no calibrated scale, no ramp), for comparison.
        ramp: share of the quantized epochs at which the strength of the normalisation has reached 1.
        hold: share of the quantized epochs at which the strength starts to fall.
        release: share of the quantized epochs from which the strength is 0.
        beta: share of the newest gradient energy in its moving average (ours: the paper gives none).
        eta: gain of the feedback law (ours).
        epsilon: floor of an energy in the feedback law (ours).
        learning_rate: factor on the learning rate for the branch weights under ``learnable``.
    """

    enabled: bool = False
    scope: str = "neck"
    balance: str = "learnable"
    fold: str = "anneal"
    paper: bool = False
    ramp: float = 0.05
    hold: float = 0.5
    release: float = 0.9
    beta: float = 0.1
    eta: float = 0.01
    epsilon: float = 1e-12
    learning_rate: float = 1.0

    def validate(self, where: str) -> None:
        _choice(f"{where}.scope", self.scope, ("neck", "all"))
        _choice(f"{where}.balance", self.balance, BALANCES)
        if self.balance == "backward" and (self.paper or self.fold != "anneal"):
            raise UserError(
                f"{where}: balance: backward has no normalisation, so paper and fold: {self.fold} mean nothing; leave "
                "both out"
            )
        _choice(f"{where}.fold", self.fold, ("anneal", "finetune", "keep"))
        if self.paper and self.fold == "anneal":
            raise UserError(f"{where}: paper: true has no ramp to anneal; set {where}.fold to finetune or keep")
        for name in ("ramp", "hold", "release", "beta"):
            _number(f"{where}.{name}", getattr(self, name), 0, 1)
        if not self.ramp <= self.hold <= self.release:
            raise UserError(f"{where}: ramp <= hold <= release must hold, not {self.ramp}, {self.hold}, {self.release}")
        for name in ("eta", "epsilon", "learning_rate"):
            _number(f"{where}.{name}", getattr(self, name), 0, 1000)


@dataclass
class AttentionConfig:
    """ADA: attention maps of the quantized network drawn to those of the frozen float teacher; see ``quant.ada``.

    Attributes:
        enabled: switch it on; ``ada: true`` or ``ada: js`` for short.
        attention: ``simam``, or ``qaware`` with the quantization error in it.
        divergence: ``kl``, ``js``, or ``auto``: kl for LSQ and PACT, js for N2UQ and DSQ.
        normalisation: of maps to distributions over space: ``softmax``, or ``l1``, the paper's.
        temperature: of the softmax.
        weight: factor of the loss. At 0.005 kl over softmax maps has 2 to 25 % of the task's gradient, by data set.
        gradient_ratio: above 0, ``weight`` is only the first one: it is moved so that the loss's gradient where Detect
            reads is this share of the task's.
        quantized: compare what the layer's reader sees, not the layer's output itself.
        saliency_gamma: weight of the quantization error under ``attention: qaware``.
        layers: list of layer numbers; None takes those that feed Detect.
    """

    enabled: bool = False
    attention: str = "simam"
    divergence: str = "auto"
    normalisation: str = "softmax"
    temperature: float = 1.0
    weight: float = 0.005
    gradient_ratio: float = 0.0
    quantized: bool = False
    saliency_gamma: float = 1.0
    layers: list[int] | None = None

    def validate(self, where: str) -> None:
        _choice(f"{where}.attention", self.attention, ("simam", "qaware"))
        _choice(f"{where}.divergence", self.divergence, DIVERGENCES)
        _choice(f"{where}.normalisation", self.normalisation, ("softmax", "l1"))
        _number(f"{where}.temperature", self.temperature, 1e-3, 1e3)
        _number(f"{where}.weight", self.weight, 0, 1e6)
        _number(f"{where}.gradient_ratio", self.gradient_ratio, 0, 1e3)
        if self.enabled and self.gradient_ratio and not self.weight:
            raise UserError(f"{where}.gradient_ratio: a weight of 0 has no gradient to scale; leave {where}.weight out")
        _number(f"{where}.saliency_gamma", self.saliency_gamma, 0, 1e3)
        _layer_numbers(f"{where}.layers", self.layers)


# Weights of the terms when a recipe only names them: each gives 6 to 25 % of the task's gradient (YOLOv5n, 3, 4 bit).
DISTILLATION_WEIGHTS = {"feature_mse": 0.05, "channel_wise": 0.12, "logits": 0.03, "boxes": 0.03}


@dataclass
class DistillationConfig:
    """Further losses on the teacher's forward pass that ADA also uses; see ``quant.distillation``. 0 switches one off.

    By default the network learns from the float one's raw maps and boxes. ``distillation: false`` switches everything
    off; ``distillation: feature_mse`` or a list of names switches on these terms and no others.

    Attributes:
        feature_mse: weight of the relative squared distance of features; ``true`` or its name: 0.05.
        channel_wise: weight of the divergence of each channel's map over space; ``true`` or its name: 0.12.
        logits: weight of the distance of Detect's raw maps; ``true`` or its name: 0.03.
        boxes: weight of 1 - CIoU with the float network's boxes; ``true`` or its name: 0.03.
        gradient_ratio: of each term, as in ``ada``: weights are only the first ones unless it is 0.
        temperature: of ``channel_wise``.
        layers: list of layer numbers; None takes those that feed Detect.
    """

    feature_mse: float = 0.0
    channel_wise: float = 0.0
    logits: float = DISTILLATION_WEIGHTS["logits"]
    boxes: float = DISTILLATION_WEIGHTS["boxes"]
    gradient_ratio: float = 1.0
    temperature: float = 1.0
    layers: list[int] | None = None

    @property
    def weights(self) -> dict[str, float]:
        """The terms that are on, with their weights."""
        return {name: getattr(self, name) for name in DISTILLATION_WEIGHTS if getattr(self, name) > 0}

    def validate(self, where: str) -> None:
        for name in DISTILLATION_WEIGHTS:
            _number(f"{where}.{name}", getattr(self, name), 0, 1e6)
        _number(f"{where}.gradient_ratio", self.gradient_ratio, 0, 1e3)
        _number(f"{where}.temperature", self.temperature, 1e-3, 1e3)
        _layer_numbers(f"{where}.layers", self.layers)


@dataclass
class NormConfig:
    """Batch norms during quantized training; see ``quant.norms``.

    Attributes:
        reestimate: training images (augmented) from which the statistics of the averaged network are computed anew
            before it is validated; 0 leaves them as they were averaged. A calibrated network's move by what at most 128
            of them say.
        freeze: share of the epochs, at their end, in which batch norms normalise by their running statistics, which
            stand still.
        correction: epochs, at the end of the quantized ones, in which nothing but the batch norms' gains and shifts
            learns, from the averaged network and with standing statistics (WACV 2024, arXiv 2311.05109).
    """

    reestimate: int = 512
    freeze: float = 0.0
    correction: int = 0

    def validate(self, where: str) -> None:
        _number(f"{where}.reestimate", self.reestimate, 0, 100000)
        _number(f"{where}.freeze", self.freeze, 0, 1)
        _number(f"{where}.correction", self.correction, 0, 100000)


@dataclass
class LayerOverride:
    """Bits of the convolutions whose name a regular expression matches.

    Attributes:
        weight_bits: 2 to 8; None keeps the general ones.
        activation_bits: of the input, 2 to 8; None keeps the general ones.
    """

    weight_bits: int | None = None
    activation_bits: int | None = None

    def validate(self, where: str) -> None:
        for name in ("weight_bits", "activation_bits"):
            if getattr(self, name) is not None:
                _choice(f"{where}.{name}", getattr(self, name), BITS)


@dataclass
class AutoBits:
    """Weight bits chosen layer by layer, see ``quant.precision``: the request, and whether it has been carried out.

    Attributes:
        average: budget, the average weight bits of the layers that are chosen for; None chooses nothing.
        cost: what the average is weighted by: ``parameters`` (size of the file), or ``bops`` (bit operations).
        resolved: the choice stands in ``layers`` already; nothing is searched again.
    """

    average: float | None = None
    cost: str = "parameters"
    resolved: bool = False

    def validate(self, where: str) -> None:
        if self.average is not None:
            _number(f"{where}.average", self.average, BITS[0], BITS[-1])
        _choice(f"{where}.cost", self.cost, AUTO_COSTS)

    @property
    def pending(self) -> bool:
        """Whether bits remain to be chosen."""
        return self.average is not None and not self.resolved


@dataclass
class QuantConfig:
    """Everything that fixes a quantized network's training graph.

    Attributes:
        method: name in ``quant.registry``: lsq, lsq+, pact, dsq, n2uq.
        target: what the exported network will run in: ``onnxruntime`` (OpenVINO too), or ``tensorrt``, whose zero
            points are all 0. It changes the grids, hence it is chosen before training.
        weight: grids of the weights of all convolutions but the first and Detect's last.
        activation: grids of their inputs.
        first_layer_bits: weight bits of the first convolution (the image itself is always 8 bit).
        detect_bits: weight and input bits of Detect's last convolutions.
        layers: regular expression (full match of a convolution's module name) -> ``LayerOverride``.
        auto_bits: a budget from which ``layers`` is filled.
        options: of the method, see its ``Options``; all have ``paper``.
        calibration: first ranges.
        batch_norm: statistics of batch norms.
        gabfusion: fusion of branches.
        ada: attention distillation.
        distillation: further losses on the teacher.
    """

    method: str = "lsq"
    target: str = "onnxruntime"
    weight: WeightConfig = field(default_factory=WeightConfig)
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    first_layer_bits: int = 8
    detect_bits: int = 8
    layers: dict[str, LayerOverride] = field(default_factory=dict)
    auto_bits: AutoBits = field(default_factory=AutoBits)
    options: dict[str, Any] = field(default_factory=dict)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    batch_norm: NormConfig = field(default_factory=NormConfig)
    gabfusion: FusionConfig = field(default_factory=FusionConfig)
    ada: AttentionConfig = field(default_factory=AttentionConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def method_options(self, where: str = "recipe") -> MethodOptions:
        """``options`` as an instance of the method's ``Options``.

        Raises:
            UserError: an option that the method does not have, or an impossible value.
        """
        options = _from_dict(QUANTIZERS[self.method].Options, self.options, where, "options")
        try:
            options.validate()
        except ValueError as error:
            raise UserError(f"{where}: options of {self.method}: {error}") from None
        return options

    def validate(self, where: str = "recipe") -> None:
        """Raises UserError naming the key of the first impossible value."""
        _choice(f"{where}: method", self.method, tuple(QUANTIZERS))
        _choice(f"{where}: target", self.target, ("onnxruntime", "tensorrt"))
        _choice(f"{where}: first_layer_bits", self.first_layer_bits, BITS)
        _choice(f"{where}: detect_bits", self.detect_bits, BITS)
        blocks = ("weight", "activation", "auto_bits", "calibration", "batch_norm", "gabfusion", "ada", "distillation")
        for name in blocks:
            getattr(self, name).validate(f"{where}: {name}")
        schemes = ("auto", *QUANTIZERS[self.method].schemes)
        _choice(f"{where}: activation.scheme under method {self.method}", self.activation.scheme, schemes)
        options = self.method_options(where)
        if self.target == "tensorrt":
            self._check_tensorrt(options, where)
        fused = self.gabfusion
        if self.batch_norm.correction and fused.enabled and fused.fold != "anneal" and not fused.paper:
            raise UserError(
                f"{where}: batch_norm.correction wants a fusion without its normalisation; set gabfusion.fold to anneal"
            )
        for pattern, override in self.layers.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}: layers: {pattern!r} is not a regular expression ({error})") from None
            override.validate(f"{where}: layers: {pattern}")

    def _check_tensorrt(self, options: MethodOptions, where: str) -> None:
        """Raises UserError where TensorRT (int8 codes, zero point 0) could not run what would be trained."""
        scheme, output = self.activation.scheme, self.activation.output
        if scheme not in ("auto", "signed"):
            raise UserError(
                f"{where}: target: tensorrt has zero points of 0 only, and activation.scheme is {scheme}; leave the "
                "scheme out, or set it to signed"
            )
        if output is not None:
            raise UserError(
                f"{where}: target: tensorrt fuses a convolution with its activation function, which activation.output "
                "would tear apart; leave it out"
            )
        if self.gabfusion.enabled and self.gabfusion.fold == "finetune":
            raise UserError(
                f"{where}: target: tensorrt has zero points of 0 only, and gabfusion.fold: finetune leaves a shift; "
                "set gabfusion.fold to anneal"
            )
        widths = {self.activation.bits, self.detect_bits, *(o.activation_bits for o in self.layers.values())} - {None}
        for bits in sorted(widths):
            form = QUANTIZERS[self.method].for_activations(bits, "signed", options).integer()
            if form.thresholds is not None:
                raise UserError(
                    f"{where}: target: tensorrt has no operator for the thresholds of method {self.method}; take "
                    "another method, or target: onnxruntime"
                )
            if "signed" not in QUANTIZERS[self.method].schemes:
                raise UserError(
                    f"{where}: target: tensorrt has zero points of 0 only, and {self.method} is affine by definition; "
                    "take lsq or another method"
                )
            if form.zero_point != 0 or form.grid.qmin >= 0:
                raise UserError(
                    f"{where}: target: tensorrt needs grids with a sign and zero point 0, and {self.method} makes "
                    f"{form.grid.qmin} .. {form.grid.qmax} with these options; set options.paper to false, or take "
                    "another method"
                )

    def resolved_scheme(self) -> str:
        """``activation.scheme`` with ``auto`` replaced: signed for TensorRT, else affine."""
        if self.activation.scheme != "auto":
            return self.activation.scheme
        return "signed" if self.target == "tensorrt" else "affine"

    def bits_label(self) -> str:
        """The general bits in short: ``w4a4``, or ``w4.5a5 mixed`` where they are chosen layer by layer."""
        if self.auto_bits.average is None:
            return f"w{self.weight.bits}a{self.activation.bits}"
        return f"w{self.auto_bits.average:g}a{self.activation.bits} mixed"

    @property
    def equalizes(self) -> bool:
        """Whether channels of inputs are equalized: not where integer operators read what a convolution writes or a
        Concat has to have one scale, nor where a fusion leaves a shift of whole steps in front of the quantizer, or its
        statistics."""
        exact = not self.gabfusion.enabled or self.gabfusion.fold == "anneal"
        possible = self.activation.output is None and self.target != "tensorrt"
        return self.activation.equalization > 0 and possible and exact

    @property
    def fewest_bits(self) -> int:
        """The general bits, of weights or of activations, whichever are fewer; not of single layers."""
        return min(self.weight.bits, self.activation.bits)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, as it goes into YAML files and checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> QuantConfig:
        """Builds and validates a configuration.

        Args:
            values: nested plain dict; missing keys keep their defaults.
            where: file name for error messages.

        Raises:
            UserError: unknown key (with the nearest known one), wrong type or impossible value.
        """
        config = _from_dict(cls, values, where, "")
        config.validate(where)
        return config

    @classmethod
    def from_saved(cls, values: dict[str, Any], where: str) -> QuantConfig:
        """``from_dict`` for what ``to_dict`` once wrote: keys that did not exist then are off, whatever a recipe's
        default is now."""
        defaults = {"activation": {"equalization": 0.0}, "distillation": {"boxes": 0.0}}
        given = {key: value for key, value in values.items() if isinstance(value, dict)}
        old = {key: {**keys, **given[key]} for key, keys in defaults.items() if key in given}
        return cls.from_dict({**values, **old}, where)

    def check_layers(self, count: int) -> None:
        """Raises UserError if a layer to learn a teacher's features from is not among the first ``count``."""
        for block in ("ada", "distillation"):
            wrong = [index for index in getattr(self, block).layers or [] if not 0 <= index < count]
            if wrong:
                raise UserError(
                    f"{block}.layers: {wrong[0]} is not a layer of this model; its layers are 0 to {count - 1}"
                )

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares with a float teacher."""
        return self.ada.enabled or bool(self.distillation.weights)

    def resolved_divergence(self) -> str:
        """``ada.divergence`` with ``auto`` replaced: kl suits PACT and LSQ, js DSQ and N2UQ."""
        if self.ada.divergence != "auto":
            return self.ada.divergence
        return "js" if self.method in ("n2uq", "dsq") else "kl"


def _from_dict(cls: type, values: Any, where: str, path: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where}: {path or 'the file'} must be a mapping of keys to values, not {values!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {full!r}; {hint}")
        default = known[key].default_factory() if known[key].default is dataclasses.MISSING else known[key].default
        if dataclasses.is_dataclass(default):
            value = _from_dict(type(default), expand_block(value, full), where, full)
        elif full == "layers":
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{where}: layers must map regular expressions to bits, not {value!r}")
            value = {
                str(pattern): _from_dict(LayerOverride, override, where, f"layers.{pattern}")
                for pattern, override in (value or {}).items()
            }
        elif full == "options":
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{where}: options must map names to values, not {value!r}")
            value = dict(value or {})
        elif isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{where}: {full}: {value!r} is not true or false")
        elif isinstance(default, int) and not isinstance(default, bool) and not isinstance(value, int):
            raise UserError(f"{where}: {full}: {value!r} is not a whole number")
        elif isinstance(value, str) and (isinstance(default, float) or known[key].type == "float | None"):
            value = _float_from_text(value, where, full)  # YAML 1.1 reads 1e-3 as text
        arguments[key] = value
    return cls(**arguments)


def expand_block(value: Any, path: str) -> Any:
    """Lets blocks be switched by one word: ``gabfusion`` and ``ada`` by true, false or their main option,
    ``distillation`` by the names of its terms."""
    if path == "distillation":
        return _distillation_block(value)
    if path == "gabfusion" and not isinstance(value, dict):
        return {"enabled": value} if isinstance(value, bool) else {"enabled": True, "balance": value}
    if path == "ada" and not isinstance(value, dict):
        return {"enabled": value} if isinstance(value, bool) else {"enabled": True, "divergence": value}
    if path in ("gabfusion", "ada"):
        return {"enabled": True, **value}
    return value


def _distillation_block(value: Any) -> Any:
    """Names of terms, or ``true`` in place of a weight, become the weights of ``DISTILLATION_WEIGHTS``."""
    if value is False:
        value = []
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        value = dict.fromkeys(DISTILLATION_WEIGHTS, False) | {str(name): True for name in value}
    if not isinstance(value, dict):
        return value
    defaults = {True: DISTILLATION_WEIGHTS, False: dict.fromkeys(DISTILLATION_WEIGHTS, 0.0)}
    return {
        key: defaults[number][key] if isinstance(number, bool) and key in DISTILLATION_WEIGHTS else number
        for key, number in value.items()
    }


def _float_from_text(text: str, where: str, path: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {path}: {text!r} is not a number") from None
