import numpy as np
import pytest
import torch

from utils.augment import denormalise_labels
from utils.boxes import scale_boxes, xywhn_to_xyxy
from utils.dataset import (
    DetectionDataset,
    EpochSampler,
    _report_unless_left,
    collate,
    collate_quads,
    create_dataloader,
    rect_batch_shapes,
)
from utils.dataset_yaml import load_dataset_yaml
from utils.errors import UserError
from utils.images import write_image

HYP = {"hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "translate": 0.1, "scale": 0.5, "fliplr": 0.5, "flipud": 0.2}
HYP |= {"mosaic": 0.7, "mixup": 0.5, "degrees": 5.0}


def train(yaml_file, **arguments):
    arguments = {"hyp": HYP, "augment": True, "shuffle": True, "workers": 0} | arguments
    return create_dataloader(yaml_file.parent / "images" / "train", 64, 3, **arguments)


def epoch(loader, number):
    loader.set_epoch(number)
    return list(loader)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert one[2:] == two[2:]


@pytest.mark.parametrize(
    "ratios, expected",
    [((0.6, 0.75), (512, 672)), ((1.33, 1.5), (672, 512)), ((0.9, 1.1), (672, 672)), ((1.0, 1.0), (672, 672))],
)
def test_rect_shapes_equal_the_golden_values(ratios, expected):
    shapes = rect_batch_shapes(np.array(ratios), np.zeros(2, int), 640, 32, 0.5)
    assert tuple(shapes[0]) == expected


def test_a_batch_has_the_promised_shapes(tiny_dataset):
    loader, dataset = train(tiny_dataset)
    assert len(loader) == 3
    batches = epoch(loader, 0)
    assert [len(batch[0]) for batch in batches] == [3, 3, 2]
    for images, targets, paths, shapes in batches:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 64, 64)
        assert targets.dtype == torch.float32
        assert targets.shape[1] == 6
        assert set(targets[:, 0].tolist()) <= set(range(len(images)))
        assert (targets[:, 0].diff() >= 0).all()
        assert ((targets[:, 2:] >= 0) & (targets[:, 2:] <= 1)).all()
        assert len(paths) == len(shapes) == len(images)
    assert sorted(path for batch in batches for path in batch[2]) == sorted(dataset.image_files)


def test_an_epoch_depends_on_the_seed_only_and_not_on_the_workers(tiny_dataset):
    single, _ = train(tiny_dataset)
    several, _ = train(tiny_dataset, workers=2)
    cached, _ = train(tiny_dataset, cache="ram")
    mapped, _ = train(tiny_dataset, cache="disk", workers=2)
    straight = [epoch(single, number) for number in range(3)]
    assert_same(straight[0], epoch(several, 0))
    assert_same(straight[2], epoch(several, 2))  # resumed: epoch 1 was never drawn
    assert_same(straight[1], epoch(cached, 1))
    assert_same(straight[1], epoch(mapped, 1))
    assert_same(straight[1], epoch(single, 1))
    assert not torch.equal(straight[0][0][0], straight[1][0][0])
    assert straight[0][0][2] != straight[1][0][2]
    other, _ = train(tiny_dataset, seed=1)
    assert not torch.equal(straight[0][0][0], epoch(other, 0)[0][0])


def test_a_plain_index_belongs_to_the_epoch_that_was_set(tiny_dataset):
    _, dataset = train(tiny_dataset)
    dataset.set_epoch(4)
    assert torch.equal(dataset[2][0], dataset[(4, 2)][0])
    assert not torch.equal(dataset[2][0], dataset[(5, 2)][0])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_augmented_boxes_sit_on_objects(tmp_path):
    """White rectangles on black, through mosaic, warp and flips: every box is white inside and tight."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        image = np.zeros((80, 100, 3), np.uint8)
        left, top = rng.integers(5, 40, 2)
        image[top : top + 30, left : left + 45] = 255
        write_image(tmp_path / "images" / f"{number}.png", image)
        row = f"0 {(left + 22.5) / 100} {(top + 15) / 80} 0.45 0.375\n"
        (tmp_path / "labels" / f"{number}.txt").write_text(row)
    hyp = HYP | {"mosaic": 1.0, "mixup": 0.0, "degrees": 0.0, "hsv_v": 0.0}
    dataset = DetectionDataset(tmp_path / "images", 128, hyp=hyp, augment=True)
    boxes = 0
    for number in range(60):
        dataset.set_epoch(number)
        image, targets, _, _ = dataset[number % 6]
        white = (image[0] > 190).numpy()
        for left, top, right, bottom in xywhn_to_xyxy(targets[:, 2:], 128, 128).round().int().tolist():
            # Two pixels for edges that the enlargement has softened.
            assert white[top + 2 : bottom - 2, left + 2 : right - 2].all()
            assert top < 3 or not white[top - 3, left + 2 : right - 2].any()
            assert left < 3 or not white[top + 2 : bottom - 2, left - 3].any()
            boxes += 1
    assert boxes > 80


def test_validation_keeps_what_is_needed_to_scale_boxes_back(tmp_path):
    sizes = [(300, 200), (200, 300), (120, 90), (90, 120), (37, 211)]
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number, (height, width) in enumerate(sizes):
        write_image(tmp_path / "images" / f"{number}.png", np.full((height, width, 3), 9, np.uint8))
        (tmp_path / "labels" / f"{number}.txt").write_text("0 0.5 0.4 0.3 0.2\n")
    for rect in (False, True):
        loader, dataset = create_dataloader(tmp_path / "images", 160, 2, rect=rect, pad=0.5 if rect else 0, workers=0)
        ratios = dataset.shapes[:, 1] / dataset.shapes[:, 0]
        assert not rect or (np.diff(ratios) >= 0).all()
        for images, targets, paths, shapes in loader:
            assert rect or images.shape[2:] == (160, 160)
            assert images.shape[2] % 32 == images.shape[3] % 32 == 0
            for position, (path, (native, ratio_pad)) in enumerate(zip(paths, shapes, strict=True)):
                assert native == sizes[int(path[-5])]
                rows = targets[targets[:, 0] == position, 2:]
                boxes = xywhn_to_xyxy(rows, images.shape[3], images.shape[2])
                back = scale_boxes(images.shape[2:], boxes, native, ratio_pad)
                expected = denormalise_labels(np.array([[0, 0.5, 0.4, 0.3, 0.2]]), native[1], native[0])
                np.testing.assert_allclose(back, expected[:, 1:], atol=1.5)  # sizes are rounded to whole pixels
                content = (images[position, 0] == 9).sum().item() / images[0, 0].numel()
                long_side = max(native)
                share = -(-native[0] * 160 // long_side) * -(-native[1] * 160 // long_side) / images[0, 0].numel()
                assert content == pytest.approx(share, rel=0.03)


def test_images_are_rgb(tmp_path):
    (tmp_path / "images").mkdir()
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 2] = 255  # red in BGR
    write_image(tmp_path / "images" / "a.png", image)
    item = DetectionDataset(tmp_path / "images", 32)[0]
    assert item[0][:, 5, 5].tolist() == [255, 0, 0]
    assert item[1].shape == (0, 6)


def test_single_class_and_class_range(tiny_dataset):
    images = tiny_dataset.parent / "images" / "train"
    dataset = DetectionDataset(images, 64, single_class=True, num_classes=1)
    assert {float(value) for rows in dataset.labels for value in rows[:, 0]} == {0.0}
    with pytest.raises(UserError, match=r"class \d, but the data set has 3 names"):
        DetectionDataset(images, 64, num_classes=3)


def test_training_without_labels_is_refused(tiny_dataset):
    for file in (tiny_dataset.parent / "labels" / "train").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no labels"):
        train(tiny_dataset)
    with pytest.raises(UserError, match="--cache tape"):
        DetectionDataset(tiny_dataset.parent / "images" / "val", 64, cache="tape")


def test_rectangular_training_makes_no_mosaic(tiny_dataset):
    loader, dataset = train(tiny_dataset, rect=True, shuffle=True)
    assert not dataset.mosaic
    assert_same(epoch(loader, 0), epoch(train(tiny_dataset, rect=True)[0], 0))


def test_ranks_share_an_epoch():
    everything = [index for _, index in EpochSampler(11, True, seed=2)]
    assert sorted(everything) == list(range(11))
    parts = [list(EpochSampler(11, True, 2, rank, 4)) for rank in range(4)]
    assert {len(part) for part in parts} == {3}
    assert {index for part in parts for _, index in part} == set(range(11))
    sampler = EpochSampler(11, True, 2)
    sampler.set_epoch(1)
    assert [index for _, index in sampler] != everything
    assert [index for _, index in EpochSampler(4, False)] == [0, 1, 2, 3]


def test_real_images_in_rectangular_batches(shared_data):
    folder = shared_data / "coco-slice" / "images" / "val2017"
    loader, dataset = create_dataloader(folder, 640, 8, rect=True, pad=0.5, workers=0, num_classes=80)
    assert len(dataset) == 200
    assert len(loader) == 25
    images, targets, _, shapes = next(iter(loader))
    assert images.shape[3] == 672
    assert images.shape[2] < 672
    assert all(max(native[0] * ratio[0], native[1] * ratio[1]) == pytest.approx(640) for native, (ratio, _) in shapes)
    assert len(targets) == sum(map(len, dataset.labels[:8]))


def test_rect_shapes_equal_a_search_for_each_batch():
    rng = np.random.default_rng(0)
    ratios = np.sort(rng.uniform(0.4, 2.2, 103))
    index = np.arange(103) // 8
    expected = np.ones((13, 2))
    for batch in range(13):
        mine = ratios[index == batch]
        if mine.max() < 1:
            expected[batch, 0] = mine.max()
        elif mine.min() > 1:
            expected[batch, 1] = 1 / mine.min()
    expected = np.ceil(expected * 640 / 32 + 0.5).astype(int) * 32
    assert np.array_equal(rect_batch_shapes(ratios, index, 640, 32, 0.5), expected)
    assert len(np.unique(expected, axis=0)) > 5


def test_a_batch_is_channels_last_and_holds_the_planes_of_its_images(tiny_dataset):
    loader, _ = train(tiny_dataset)
    images = epoch(loader, 0)[0][0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    plain = create_dataloader(load_dataset_yaml(tiny_dataset).val, 96, 2, workers=0, prefix="val")[1]
    first, second = plain[0][0], plain[1][0]
    blue_green_red, _, _ = plain._letterboxed(0)
    assert torch.equal(first, torch.from_numpy(blue_green_red[..., ::-1].transpose(2, 0, 1).copy()))
    items = [plain[0], plain[1]]
    assert torch.equal(collate(items)[0], torch.stack((first, second)))


def test_quads_equal_a_plain_construction():
    """Both ways of making one, against slices and loops; the group that is not full takes the batch's first images."""
    generator = np.random.default_rng(0)
    items = []
    for number in range(6):
        pixels = torch.from_numpy(generator.integers(0, 255, (8, 12, 3), dtype=np.uint8)).permute(2, 0, 1)
        rows = torch.tensor([[0, number, 0.25, 0.5, 0.5, 0.25]])
        items.append((pixels, rows, f"{number}.jpg", None))
    kinds = set()
    for first in range(6):
        rolled = items[first:] + items[:first]
        images, targets, paths, shapes = collate_quads(rolled)
        assert images.shape == (2, 3, 16, 24) and shapes == [None, None]
        for index, group in enumerate((rolled[:4], [*rolled[4:], *rolled[:2]])):
            rows = targets[targets[:, 0] == index]
            assert paths[index] == group[0][2]
            kinds.add(len(rows))
            if len(rows) == 1:
                enlarged = torch.nn.functional.interpolate(group[0][0][None].float(), (16, 24), mode="bilinear")[0]
                assert (images[index] - enlarged).abs().max() <= 1
                assert rows.tolist() == [[index, *group[0][1][0, 1:].tolist()]]
                continue
            corners = [(0, 0), (8, 0), (0, 12), (8, 12)]
            for (pixels, original, _, _), (top, left), row in zip(group, corners, rows, strict=True):
                assert torch.equal(images[index, :, top : top + 8, left : left + 12], pixels)
                x, y = (float(original[0, 2]) * 12 + left) / 24, (float(original[0, 3]) * 8 + top) / 16
                assert row[1:].tolist() == [original[0, 1], x, y, 0.25, 0.125]
    assert kinds == {1, 4}
    assert items[0][1].tolist() == [[0, 0, 0.25, 0.5, 0.5, 0.25]]  # the data set's own labels are as they were


def test_weighted_images_are_drawn_by_their_weights_and_alike_on_every_rank():
    samplers = [EpochSampler(10, True, 7, rank, 2) for rank in (0, 1)]
    drawn = []
    for sampler in (*samplers, EpochSampler(10, True, 7)):
        sampler.weights = np.array([0.7, 0.3] + [0.0] * 8)
        sampler.set_epoch(3)
        drawn.append([index for _, index in sampler])
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2])
    counts = np.zeros(10)
    for epoch in range(200):
        samplers[0].set_epoch(epoch)
        counts += np.bincount([index for _, index in samplers[0]], minlength=10)
    assert counts[2:].sum() == 0 and 0.65 < counts[0] / counts.sum() < 0.75


def test_a_loader_process_that_is_left_says_nothing_and_other_errors_are_shown(capsys):
    _report_unless_left(BrokenPipeError, BrokenPipeError(32, "Broken pipe"), None)
    assert capsys.readouterr().err == ""
    _report_unless_left(ValueError, ValueError("a real one"), None)
    assert "ValueError: a real one" in capsys.readouterr().err
