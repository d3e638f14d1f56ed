"""The detector against the measured counts, key lists and golden values of YOLOv5 v7.0."""

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from models.yolo import (
    Detect,
    DetectionModel,
    count_gflops,
    find_model_yaml,
    main,
    model_from_weights,
    parse_activation,
    read_model_yaml,
)
from utils.checkpoint import read_weights, transfer
from utils.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
# parameters, fused parameters, state_dict keys, parameter tensors, convolutions, BatchNorms, GFLOPs at 640x640
COUNTS = {
    "yolov5n": (1_872_157, 1_867_405, 349, 177, 60, 57, 4.47),
    "yolov5s": (7_235_389, 7_225_885, 349, 177, 60, 57, 16.43),
    "yolov5m": (21_190_557, 21_172_173, 481, 243, 82, 79, 48.87),
    "yolov5l": (46_563_709, 46_533_693, 613, 309, 104, 101, 108.99),
    "yolov5x": (86_749_405, 86_705_005, 745, 375, 126, 123, 205.45),
    "yolov5n6": (3_246_940, 3_239_884, 459, 233, 79, 75, 4.56),
    "yolov5s6": (12_626_620, 12_612_508, 459, 233, 79, 75, 16.80),
}
# Published to one decimal: millions of parameters, GFLOPs (which count BatchNorm too)
PUBLISHED = {"yolov5m6": (35.7, 50.0), "yolov5l6": (76.8, 111.4), "yolov5x6": (140.7, 209.8)}
SMALL_LAYERS = (
    "3520 18560 18816 73984 115712 295424 625152 1180672 1182720 656896 131584 0 0 361984 33024 0 0 90880 147712 0 "
    "296448 590336 0 1182720 229245"
)


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count(module: nn.Module, kind: type) -> int:
    return sum(isinstance(child, kind) for child in module.modules())


def nano(**changes) -> dict:
    return {**read_model_yaml("yolov5n.yaml"), **changes}


def ghost() -> dict:
    """yolov5s with every convolution but the first and every C3 in its ghost form."""
    config = read_model_yaml("yolov5s.yaml")
    for row in config["backbone"][1:] + config["head"]:
        row[2] = {"Conv": "GhostConv", "C3": "C3Ghost"}.get(row[2], row[2])
    return config


def yolov3() -> dict:
    backbone = [[-1, 1, "Conv", [32, 3, 1]]]
    for channels, repeats in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        backbone += [[-1, 1, "Conv", [channels, 3, 2]], [-1, repeats, "Bottleneck", [channels]]]
    head = [[-1, 1, "Bottleneck", [1024, False]]]
    head += [[-1, 1, "Conv", [c, k, 1]] for c, k in ((512, 1), (1024, 3), (512, 1), (1024, 3))]  # 15
    for channels, from_backbone in ((256, 8), (128, 6)):
        head += [[-2, 1, "Conv", [channels, 1, 1]], [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]]
        head += [[[-1, from_backbone], 1, "Concat", [1]], [-1, 1, "Bottleneck", [2 * channels, False]]]
        if channels == 256:
            head += [[-1, 1, "Bottleneck", [512, False]], [-1, 1, "Conv", [256, 1, 1]], [-1, 1, "Conv", [512, 3, 1]]]
        else:
            head += [[-1, 2, "Bottleneck", [256, False]]]
    head += [[[27, 22, 15], 1, "Detect", ["nc", "anchors"]]]
    return nano(depth_multiple=1.0, width_multiple=1.0, backbone=backbone, head=head)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_released_models(name):
    model = DetectionModel(f"{name}.yaml")
    keys = len(model.state_dict())
    measured = (len(list(model.parameters())), count(model, nn.Conv2d), count(model, nn.BatchNorm2d))
    unfused = parameters_of(model)
    gflops = count_gflops(model)
    fused = parameters_of(model.fuse())
    assert (unfused, fused, keys, *measured, round(gflops, 2)) == COUNTS[name]
    assert count(model, nn.BatchNorm2d) == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size_of_the_large_p6_models(name):
    model = DetectionModel(f"{name}.yaml")
    assert parameters_of(model) / 1e6 == pytest.approx(PUBLISHED[name][0], abs=0.11)
    assert count_gflops(model) == pytest.approx(PUBLISHED[name][1], rel=0.005)


@pytest.mark.parametrize(
    "config,expected",
    [(ghost(), (3_897_605, 529, 90, 87, 8.71)), (yolov3(), (61_949_149, 439, 75, 72, 155.89))],
    ids=["ghost", "yolov3"],
)
def test_counts_of_other_networks(config, expected):
    model = DetectionModel(config)
    measured = (parameters_of(model), len(model.state_dict()), count(model, nn.Conv2d), count(model, nn.BatchNorm2d))
    assert (*measured, round(count_gflops(model), 2)) == expected


def test_parameters_of_every_layer_of_s():
    model = DetectionModel("yolov5s.yaml")
    assert [layer.np for layer in model.model] == [int(number) for number in SMALL_LAYERS.split()]
    assert [parameters_of(layer) for layer in model.model] == [layer.np for layer in model.model]


@pytest.mark.parametrize("name", ["yolov5n", "yolov5s"])
def test_state_dict_names_shapes_and_order(name):
    def described(key, tensor):
        shape = "x".join(map(str, tensor.shape)) or "-"
        return f"{key} {shape} {str(tensor.dtype).removeprefix('torch.')}"

    ours = [described(*item) for item in DetectionModel(f"{name}.yaml").state_dict().items()]
    assert ours == (GOLDEN / f"{name}_state_dict.txt").read_text().splitlines()


def test_attributes_of_the_model_and_its_layers():
    model = DetectionModel("yolov5n.yaml")
    assert model.save == [4, 6, 10, 14, 17, 20, 23]
    assert model.stride.tolist() == [8, 16, 32]
    assert model.feature_layers == [17, 20, 23]
    assert (model.nc, len(model.names), model.names[3]) == (80, 80, "3")
    assert (model.model[12].i, model.model[12].f, model.model[12].type) == (12, [-1, 6], "Concat")
    assert (model.yaml["ch"], model.yaml["nc"]) == (3, 80)
    assert DetectionModel("yolov5n6.yaml").stride.tolist() == [8, 16, 32, 64]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}
    # Measuring strides must leave no trace in the statistics.
    assert all(norm.running_mean.abs().max() == 0 and norm.num_batches_tracked == 0 for norm in norms)
    assert model.training


def test_forward_shapes_and_row_order():
    model = DetectionModel(nano(nc=3))
    images = torch.rand(2, 3, 64, 96)
    raw = model(images)
    assert [tuple(level.shape) for level in raw] == [(2, 3, 8, 12, 8), (2, 3, 4, 6, 8), (2, 3, 2, 3, 8)]
    model.eval()
    with torch.no_grad():
        predictions, raw = model(images)
        assert predictions.shape == (2, 3 * (96 + 24 + 6), 8)
        model.detect.export = True
        assert torch.equal(model(images), predictions)
    # Level 1 begins after 3 * 8 * 12 rows; anchor 2, y 3, x 5 of it:
    row = 288 + (2 * 4 + 3) * 6 + 5
    torch.testing.assert_close(predictions[1, row, 4:], raw[1][1, 2, 3, 5, 4:].sigmoid())


def test_decode_against_the_formula_in_a_loop():
    detect = Detect(2, [[10, 13, 16, 30]], [4])
    detect.set_strides([8])
    raw = torch.randn(2, 2, 3, 5, 7)
    decoded = detect.decode(raw, 0)
    sigmoid = lambda value: 1 / (1 + math.exp(-value))  # noqa: E731
    for image, anchor, y, x in ((0, 0, 0, 0), (0, 1, 2, 4), (1, 0, 1, 3), (1, 1, 2, 0)):
        tx, ty, tw, th, *rest = (sigmoid(value) for value in raw[image, anchor, y, x].tolist())
        width, height = [(10, 13), (16, 30)][anchor]
        expected = [
            (2 * tx - 0.5 + x) * 8,
            (2 * ty - 0.5 + y) * 8,
            (2 * tw) ** 2 * width,
            (2 * th) ** 2 * height,
            *rest,
        ]
        torch.testing.assert_close(decoded[image, (anchor * 3 + y) * 5 + x], torch.tensor(expected))


def test_decode_golden_values():
    detect = Detect(4, nano()["anchors"], [8, 8, 8]).eval()
    detect.set_strides([8, 16, 32])
    for convolution in detect.m:
        nn.init.zeros_(convolution.weight)
        convolution.bias.data = torch.linspace(-1, 1, 27)
    with torch.no_grad():
        predictions, _ = detect([torch.zeros(1, 8, size, size) for size in (16, 8, 4)])
    assert predictions.shape == (1, 1008, 9)
    first = [0.30306, 0.5493, 3.60577, 5.21375, 0.33352, 0.35083, 0.36855, 0.38662, 0.40501]
    last = [118.07909, 119.25626, 594.91211, 549.5307, 0.66648, 0.68335, 0.69976, 0.71567, 0.73106]
    torch.testing.assert_close(predictions[0, 0], torch.tensor(first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictions[0, -1], torch.tensor(last), rtol=1e-5, atol=1e-5)
    assert predictions.double().sum().item() == pytest.approx(217082.656, abs=0.05)


def test_decode_is_float32_in_half_precision():
    detect = Detect(4, nano()["anchors"], [8, 8, 8])
    detect.set_strides([8, 16, 32])
    raw = torch.randn(1, 3, 4, 4, 9)
    whole, half = detect.decode(raw, 2), detect.half().decode(raw.half(), 2)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=1e-2, atol=1e-2)


def test_bias_initialisation():
    torch.manual_seed(0)
    detect = Detect(80, nano()["anchors"], [4, 4, 4])
    detect.set_strides([8, 16, 32])
    before = [convolution.bias.detach().view(3, 85).clone() for convolution in detect.m]
    detect.initialise_biases()
    for convolution, old, objectness in zip(detect.m, before, (-6.684612, -5.298317, -3.912023), strict=True):
        change = convolution.bias.detach().view(3, 85) - old
        torch.testing.assert_close(change[:, :4], torch.zeros(3, 4))
        torch.testing.assert_close(change[:, 4], torch.full((3,), objectness))
        torch.testing.assert_close(change[:, 5:], torch.full((3, 80), -4.880274))


def test_anchors_in_units_of_the_stride_whatever_their_order():
    anchors = nano()["anchors"]
    expected = torch.tensor(anchors).float().view(3, 3, 2) / torch.tensor([8.0, 16.0, 32.0]).view(3, 1, 1)
    torch.testing.assert_close(DetectionModel(nano()).detect.anchors, expected)
    torch.testing.assert_close(DetectionModel(nano(anchors=anchors[::-1])).detect.anchors, expected)


def test_anchor_count_instead_of_anchors():
    model = DetectionModel("yolov5n.yaml", nc=2, anchors=4)
    assert model.detect.anchors.shape == (3, 4, 2) and model.detect.m[0].out_channels == 4 * 7
    assert model.yaml["anchors"] == 4


def test_features_are_the_outputs_of_their_layers():
    model = DetectionModel(nano(nc=2)).eval()
    seen = {}
    hooks = [model.model[i].register_forward_hook(lambda m, _, y: seen.update({m.i: y})) for i in (2, 17, 23)]
    with torch.no_grad():
        (predictions, _), features = model(torch.rand(1, 3, 64, 64), features=(2, 17, 23))
    assert list(features) == [2, 17, 23] and all(features[index] is seen[index] for index in seen)
    assert predictions.shape[-1] == 7 and len(hooks) == 3


def test_fuse_keeps_predictions():
    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml")
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, -1.5, 1.5)
    model.eval()
    fused = copy.deepcopy(model).fuse()
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(fused(images)[0], model(images)[0], rtol=1e-4, atol=1e-4)


def test_activation_key():
    model = DetectionModel(nano(activation="nn.LeakyReLU(0.1)"))
    kinds = {type(module) for module in model.modules()}
    assert nn.LeakyReLU in kinds and nn.SiLU not in kinds
    assert count(DetectionModel(nano()), nn.SiLU) == 57


@pytest.mark.parametrize(
    "text,expected",
    [
        ("nn.LeakyReLU(0.1)", "LeakyReLU(negative_slope=0.1)"),
        ("torch.nn.ReLU6()", "ReLU6()"),
        ("Hardtanh(-1, max_val=2.5)", "Hardtanh(min_val=-1, max_val=2.5)"),
        ("SiLU", "SiLU()"),
    ],
)
def test_activation_text(text, expected):
    assert repr(parse_activation(text)) == expected


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('true')", "nn.Linear(2, 2)", "nn.ReLU(open('x'))", "nn.SiLU(", "ReLU(*[1])", "1 + 1", ""],
)
def test_activation_text_is_never_evaluated(text):
    with pytest.raises(ValueError, match="is not an activation"):
        parse_activation(text)


def change_row(section: str, number: int, row) -> dict:
    config = nano()
    config[section][number] = row
    return config


@pytest.mark.parametrize(
    "config,words",
    [
        (change_row("backbone", 3, [-1, 1, "Cnv", [256]]), ["backbone row 3", "layer 3", "'Cnv' is not known", "C3"]),
        (change_row("backbone", 3, [-1, 1, "os.system", ["true"]]), ["backbone row 3", "'os.system' is not known"]),
        (change_row("backbone", 3, [-1, 1, "nn.functional", []]), ["backbone row 3", "not known"]),
        (change_row("backbone", 3, [-1, 1, "nn.modules.os", []]), ["backbone row 3", "not known"]),
        (change_row("backbone", 2, [-1, 1, "Conv"]), ["backbone row 2", "[from, repeats, module, arguments]"]),
        (change_row("backbone", 2, "Conv"), ["backbone row 2"]),
        (change_row("head", 2, [[-1, 99], 1, "Concat", [1]]), ["head row 2", "layer 12", "layer 99"]),
        (change_row("head", 2, [[-1, 12], 1, "Concat", [1]]), ["head row 2", "layer 12"]),
        (change_row("head", 2, [[-1, "6"], 1, "Concat", [1]]), ["head row 2", "'from'"]),
        (change_row("head", 2, [[-1, 4], 1, "Concat", [1]]), ["head row 2", "Concat does not fit", "[-1, 4]"]),
        (change_row("head", 0, [-1, 0, "Conv", [512]]), ["head row 0", "'repeats'"]),
        (change_row("head", 0, [-1, 1, 7, [512]]), ["head row 0", "'module'"]),
        (change_row("head", 0, [-1, 1, "Conv", 512]), ["head row 0", "'arguments'"]),
        (change_row("head", 0, [-1, 1, "Conv", []]), ["head row 0", "output channels"]),
        (change_row("head", 0, [-1, 1, "Conv", ["many"]]), ["head row 0", "output channels"]),
        (change_row("head", 0, [-1, 1, "Conv", [512, 1, 1, 0, 7]]), ["head row 0", "groups"]),
        (change_row("head", 0, [[-1, 4], 1, "Conv", [512]]), ["head row 0", "reads one layer"]),
        (change_row("head", 0, [-1, 1, "Conv", [512, 1, 1, None, 1, 1, "nn.Evil()"]]), ["head row 0", "nn.Evil()"]),
        (change_row("head", 14, [[17, 20], 1, "Detect", ["nc", "anchors"]]), ["head row 14", "anchors must be 2"]),
        (nano(head=nano()["head"][:-1]), ["last row must be Detect"]),
        (nano(backbone=None), ["'backbone'"]),
        (nano(nc="eighty"), ["'nc'"]),
        (nano(anchors=None), ["'anchors'"]),
        (nano(anchors=[[1, 2], [3, 4], "x"]), ["head row 14"]),
        (nano(depth_multiple=-1), ["'depth_multiple'"]),
        (nano(activation="__import__('os')"), ["'activation'", "is not an activation"]),
    ],
)
def test_wrong_yaml_is_refused_by_file_row_and_reason(config, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError) as refusal:
        DetectionModel(path)
    for word in ("mine.yaml", *words):
        assert word in str(refusal.value)


def test_unreadable_yaml_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml does not exist.*yolov5n\.yaml"):
        find_model_yaml("absent.yaml")
    for text in ("a: [1", "- 1\n- 2\n", "!!python/object/apply:os.system ['true']"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml"):
            read_model_yaml(tmp_path / "bad.yaml")


def test_extra_keys_stay_in_the_description():
    config = nano(gabfusion={"balance": "feedback"})
    model = DetectionModel(config, nc=5)
    assert model.yaml["gabfusion"] == {"balance": "feedback"} and model.yaml["nc"] == 5
    assert config["nc"] == 80  # the caller's dict is not touched


def test_other_image_channels_and_other_nn_classes():
    config = nano(ch=1)
    config["backbone"][2] = [-1, 2, "nn.MaxPool2d", [3, 1, 1]]
    model = DetectionModel(config)
    assert model.model[0].conv.in_channels == 1 and isinstance(model.model[2], nn.MaxPool2d)


def test_command_line_prints_table_and_summary(capsys):
    main(["--cfg", "yolov5n.yaml", "--device", "cpu"])
    output = capsys.readouterr().out
    assert "Detect" in output and "1,872,157 parameters" in output and "4.47 GFLOPs" in output


def test_official_nano_fills_every_tensor(shared_data, capsys):
    weights = read_weights(shared_data / "weights" / "yolov5n.pt")
    loaded, skipped = transfer(DetectionModel("yolov5n.yaml"), weights.state_dict)
    assert (len(loaded), skipped) == (349, [])
    loaded, skipped = transfer(DetectionModel("yolov5n.yaml", nc=20), weights.state_dict, source="yolov5n.pt")
    assert len(loaded) == 343
    assert skipped == [f"model.24.m.{level}.{kind}" for level in range(3) for kind in ("weight", "bias")]
    assert "Transferred 343/349 items from yolov5n.pt; not transferred: model.24.m.0.weight" in capsys.readouterr().out
    _, skipped = transfer(DetectionModel("yolov5n.yaml"), weights.state_dict, exclude=("anchor",))
    assert skipped == ["model.24.anchors"]


def test_official_nano_finds_the_objects_of_a_photograph(shared_data):
    """Every clearly visible labelled car of one photograph is met by a confident prediction of its class."""
    import cv2
    from torchvision.ops import box_convert, box_iou

    image_file = shared_data / "coco-slice" / "images" / "val2017" / "000000017627.jpg"
    image = cv2.imread(str(image_file))
    height, width = image.shape[:2]
    image = cv2.copyMakeBorder(image, 0, -height % 32, 0, -width % 32, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    images = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    model = model_from_weights(read_weights(shared_data / "weights" / "yolov5n.pt")).eval().fuse()
    with torch.no_grad():
        rows = model(images)[0][0]
    scores, classes = (rows[:, 4:5] * rows[:, 5:]).max(1)
    cars = rows[(scores > 0.5) & (classes == 2), :4]
    labels = torch.tensor(
        [[float(value) for value in line.split()] for line in Path(label_file(image_file)).read_text().splitlines()]
    )
    truth = labels[labels[:, 0] == 2, 1:] * torch.tensor([width, height, width, height])
    truth = truth[truth[:, 2:].prod(1) > 48**2]
    overlap = box_iou(box_convert(truth, "cxcywh", "xyxy"), box_convert(cars, "cxcywh", "xyxy"))
    assert model.names[2] == "car" and len(truth) >= 4
    assert (overlap.max(1).values > 0.6).float().mean() >= 0.8


def label_file(image_file: Path) -> Path:
    return Path(str(image_file).replace("/images/", "/labels/")).with_suffix(".txt")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_confident_rows_are_rows_of_the_decoded_predictions(layout, share):
    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=4).eval().to(memory_format=layout)
    for convolution in model.detect.m:
        convolution.weight.data.normal_(std=0.3)
        convolution.bias.data.zero_()
    images = torch.rand(3, 3, 96, 64).to(memory_format=layout)
    with torch.no_grad():
        predictions, whole = model(images)
        model.detect.decodes = False
        nothing, raw = model(images)
    threshold = float(predictions[..., 4].quantile(share))
    assert nothing is None and all(torch.equal(a, b) for a, b in zip(raw, whole, strict=True))
    rows = model.detect.confident_rows(raw, threshold)
    assert len(rows) == 3
    for mine, everything in zip(rows, predictions, strict=True):
        torch.testing.assert_close(mine, everything[everything[:, 4] > threshold], rtol=1e-5, atol=1e-4)
    expected = int((predictions[..., 4] > threshold).sum())
    assert sum(map(len, rows)) == expected and (expected == 0) == (share == 1)
