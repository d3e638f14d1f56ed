import cv2
import numpy as np
import torch
from small_detector import SMALL

from models.yolo import DetectionModel
from utils.feature_maps import GAP, TILE, feature_picture, saved_features


def test_every_layer_but_the_head_is_written(tmp_path):
    torch.manual_seed(0)
    model = DetectionModel(SMALL).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        with saved_features(model.model, tmp_path / "maps"):
            model(images)
        _, features = model(images, features=range(14))
    assert len(list((tmp_path / "maps").glob("*.png"))) == 14
    for layer in model.model[:-1]:
        stem = f"stage{layer.i}_{type(layer).__name__}_features"
        np.testing.assert_allclose(np.load(tmp_path / "maps" / f"{stem}.npy"), features[layer.i][0].numpy())
        picture = cv2.imread(str(tmp_path / "maps" / f"{stem}.png"))
        rows = -(-min(features[layer.i].shape[1], 32) // 8)
        assert picture.shape[:2] == (rows * (TILE * 2 // 3 + GAP), 8 * (TILE + GAP))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "maps").iterdir()}
    model(images)  # behind the block nothing is written
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "maps").iterdir()}


def test_tiles_show_their_own_range():
    features = torch.zeros(3, 2, 2)
    features[0] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    features[1] = features[0] * 1e-3 + 7  # the same picture at another level
    picture = feature_picture(features)
    tiles = [picture[:TILE, i * (TILE + GAP) : i * (TILE + GAP) + TILE] for i in range(4)]
    assert (tiles[0] == tiles[1]).all() and (tiles[0] != tiles[2]).any() and (tiles[3] == 255).all()
