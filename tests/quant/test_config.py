"""The configuration: defaults, merging, and what is refused."""

from pathlib import Path

import pytest
import yaml

from quant.config import QuantConfig
from quant.recipe import build_config, merge, parse_bits
from utils.errors import UserError
from utils.hyp import QUANTIZED_DEFAULTS, load_hyp, phase_hyp

RECIPES = Path(__file__).parents[2] / "quant" / "recipes"


@pytest.mark.parametrize("text, expected", [("4", (4, 4)), (8, (8, 8)), ("w4a8", (4, 8)), ("W2A3", (2, 3))])
def test_bits(text, expected):
    assert parse_bits(text) == expected


@pytest.mark.parametrize("text", ["1", "9", "w4", "a4w4", "four", "w1a4", "4.0", "-4"])
def test_impossible_bits(text):
    with pytest.raises(UserError, match="--bits"):
        parse_bits(text)


def test_round_trip_through_yaml():
    config = build_config("lsq", "w3a5", gabfusion="feedback", ada="js")
    assert QuantConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert (config.weight.bits, config.activation.bits, config.gabfusion.balance) == (3, 5, "feedback")
    assert config.resolved_divergence() == "js" and build_config("lsq", ada=True).resolved_divergence() == "kl"


def test_flags_win_over_recipe_over_model_yaml_over_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("weight: {bits: 3}\nactivation: {bits: 5}\ngabfusion: {eta: 0.5}\n")
    model_yaml = {"gabfusion": {"balance": "fixed", "eta": 0.25, "beta": 0.5}}
    config = build_config("lsq", None, None, None, recipe, model_yaml)
    assert (config.weight.bits, config.activation.bits, config.resolved_scheme()) == (3, 5, "affine")
    fusion = config.gabfusion
    assert (fusion.enabled, fusion.balance, fusion.eta, fusion.beta) == (True, "fixed", 0.5, 0.5)
    assert build_config("lsq", 2, "feedback", None, recipe, model_yaml).gabfusion.balance == "feedback"
    assert build_config("lsq", 2, None, None, recipe).weight.bits == 2
    assert build_config(model_yaml={"gabfusion": True}).gabfusion.enabled
    assert not build_config(model_yaml={"gabfusion": False}).gabfusion.enabled


@pytest.mark.parametrize(
    "values, message",
    [
        ({"methd": "lsq"}, "unknown key 'methd'; did you mean 'method'"),
        ({"activation": {"shceme": "affine"}}, "unknown key 'activation.shceme'; did you mean 'scheme'"),
        ({"weight": {"bits": 1}}, "weight.bits: 1 is not possible"),
        ({"activation": {"scheme": "ternary"}}, "'ternary' is not possible"),
        ({"gabfusion": {"ramp": 0.9, "hold": 0.1}}, "ramp <= hold <= release"),
        ({"gabfusion": {"paper": True}}, "no ramp to anneal"),
        ({"gabfusion": {"enabled": "yes"}}, "is not true or false"),
        ({"ada": {"weight": "much"}}, "is not a number"),
        ({"ada": {"layers": 17}}, "not a list of layer numbers"),
        ({"layers": {"model.[": {"weight_bits": 4}}}, "not a regular expression"),
        ({"layers": {"model.1": {"weight_bits": 12}}}, "12 is not possible"),
        ({"weight": 4}, "must be a mapping"),
    ],
)
def test_refusals_name_the_key(values, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        QuantConfig.from_dict(values, "my.yaml")


def test_broken_recipe_files(tmp_path):
    broken = tmp_path / "b.yaml"
    broken.write_text("weight: {bits: [")
    with pytest.raises(UserError, match="not a valid YAML file"):
        build_config("lsq", recipe=broken)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_come_along_are_valid(file):
    assert build_config("lsq", recipe=file.stem).method == "lsq"


def test_the_written_out_recipe_is_the_default():
    assert build_config("lsq", recipe="lsq-w4a4") == build_config("lsq", 4)


def test_merge_leaves_its_arguments_alone():
    base, change = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert merge(base, change) == {"a": {"b": 3, "c": 2}}
    assert base == {"a": {"b": 1, "c": 2}} and change == {"a": {"b": 3}}


def test_hyperparameter_files(tmp_path):
    hyp = load_hyp("hyp.scratch-low.yaml")
    assert hyp["lr0"] == 0.01 and hyp["quant_lr0"] == QUANTIZED_DEFAULTS["quant_lr0"]
    assert phase_hyp(hyp, False)["lr0"] == 0.01 and phase_hyp(hyp, False)["nominal_batch"] == 64
    assert phase_hyp(hyp, True)["lr0"] == QUANTIZED_DEFAULTS["quant_lr0"]
    rates = [phase_hyp(hyp, True, bits)["lr0"] / hyp["quant_lr0"] for bits in (2, 3, 4, 8)]
    assert rates == [4, 2, 1, 1 / 16] and phase_hyp(hyp | {"quant_lr_per_bit": 1.0}, True, 8)["lr0"] == hyp["quant_lr0"]
    del hyp["quant_lr_per_bit"]  # a run of an older version goes on as it was
    assert phase_hyp(hyp, True, 2)["lr0"] == hyp["quant_lr0"]
    own = tmp_path / "h.yaml"
    own.write_text("quant_lr0: 1e-3\nlr0: 0.5\n")
    assert load_hyp(own)["quant_lr0"] == 0.001 and load_hyp(own)["momentum"] == 0.937
    own.write_text("quant_lr: 0.1\n")
    with pytest.raises(UserError, match="did you mean"):
        load_hyp(own)
    own.write_text("lr0: fast\n")
    with pytest.raises(UserError, match="'fast' is not a number"):
        load_hyp(own)


def test_options_of_a_recipe_belong_to_the_method_of_the_flag(tmp_path):
    file = tmp_path / "penalty.yaml"
    file.write_text("options: {penalty: 0, weights: dorefa}\n")
    assert build_config("pact", recipe=file).options == {"penalty": 0, "weights": "dorefa"}
    with pytest.raises(UserError, match=r"penalty.yaml: unknown key 'options.penalty'"):
        build_config(recipe=file)


@pytest.mark.parametrize("block", [{"fold": "keep"}, {"paper": True, "fold": "finetune"}])
def test_backward_balance_has_no_normalisation_to_fold(block):
    with pytest.raises(UserError, match="gabfusion: balance: backward"):
        QuantConfig.from_dict({"gabfusion": {"balance": "backward", **block}})
    assert QuantConfig.from_dict({"gabfusion": "backward"}).gabfusion.balance == "backward"


def test_a_correction_wants_a_fusion_that_is_annealed():
    given = {"method": "lsq", "batch_norm": {"correction": 1}}
    QuantConfig.from_dict(given | {"gabfusion": True}).validate()
    with pytest.raises(UserError, match=r"batch_norm.correction .* gabfusion.fold to anneal"):
        QuantConfig.from_dict(given | {"gabfusion": {"enabled": True, "fold": "keep"}})
