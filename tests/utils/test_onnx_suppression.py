"""Suppression in the graph keeps the boxes that ``non_max_suppression`` keeps."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from utils.errors import UserError
from utils.nms import non_max_suppression
from utils.onnx_suppression import add_suppression
from utils.suppression import Suppression


def rows(batch, anchors, classes, seed=0):
    """Boxes in clusters, so that many overlap."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(1, 5, (batch, anchors, 2), generator=generator) * 40.0
    box = torch.cat((centre, torch.full((batch, anchors, 2), 30.0)), 2)
    box += 4 * torch.randn(box.shape, generator=generator)
    return torch.cat((box, torch.rand(batch, anchors, 1 + classes, generator=generator)), 2)


def passing(shape, opset):
    """A model that hands its rows on."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "output0")]
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["output0"])], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model, batch):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    table, count = session.run(["output0", "count"], {"images": batch.numpy()})
    return torch.from_numpy(table), count


@pytest.mark.parametrize("opset", [12, 13, 17, 21])
@pytest.mark.parametrize(
    "settings", [Suppression(), Suppression(0.6, 0.3, 5), Suppression(0.01, 0.7, 300, True), Suppression(0.0, 1.0, 90)]
)
def test_the_graph_keeps_the_same_boxes(settings, opset):
    decoded = rows(3, 80, 4)
    table, count = run(add_suppression(passing([3, 80, 9], opset), settings), decoded)
    wanted = non_max_suppression(
        decoded, settings.confidence, settings.iou, agnostic=settings.agnostic, max_detections=settings.max_detections
    )
    assert tuple(table.shape) == (3, settings.max_detections, 6) and count.dtype == np.int64
    assert count.tolist() == [len(found) for found in wanted] and min(count) > 0
    for mine, number, ours in zip(table, count, wanted, strict=True):
        torch.testing.assert_close(mine[:number], ours, rtol=1e-5, atol=1e-4)
        assert not mine[number:].any()


def test_open_batch_and_size_and_nothing_found():
    model = add_suppression(passing(["batch", "anchors", 8], 17), Suppression(0.5, 0.45, 20))
    for batch, anchors in ((1, 3), (2, 64)):
        decoded = rows(batch, anchors, 3, seed=2)
        table, count = run(model, decoded)
        wanted = non_max_suppression(decoded, 0.5, 0.45, max_detections=20)
        assert tuple(table.shape) == (batch, 20, 6) and count.tolist() == [len(found) for found in wanted]
    table, count = run(model, torch.zeros(2, 5, 8))
    assert count.tolist() == [0, 0] and not table.any()


def test_the_settings_travel_in_the_metadata():
    settings = Suppression(0.1, 0.5, 7, True)
    assert Suppression.from_metadata(settings.to_metadata()) == settings
    for broken in ({}, {"nms": "x"}, {"nms": "[]"}, {"nms": '{"confidence": 0.1}'}, {"nms": '{"confidence": "a"}'}):
        assert Suppression.from_metadata(broken) is None


@pytest.mark.parametrize(
    "values, flag", [((1.5,), "--conf-thres 1.5"), ((0.1, -1.0), "--iou-thres -1.0"), ((0.1, 0.1, 0), "--max-det 0")]
)
def test_settings_that_mean_nothing_name_their_flag(values, flag):
    with pytest.raises(UserError, match=flag):
        Suppression(*values)
