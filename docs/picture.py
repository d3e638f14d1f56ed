"""Draws figures/shapes.jpg, detections of a run's float and quantized network: python docs/picture.py runs/train/exp"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from run_report.collect import read_run  # noqa: E402
from run_report.pictures import detect_all, found_labels, pick, validation_images  # noqa: E402
from utils.dataset_yaml import load_dataset_yaml  # noqa: E402

FILE = Path(__file__).parent / "figures" / "shapes.jpg"
COLUMNS, SIDE, GAP, BAND = 4, 256, 8, 30
CONFIDENCE = 0.4
# Okabe and Ito's colours, BGR, one a class.
COLOURS = ((0, 159, 230), (178, 114, 0), (115, 158, 0), (167, 121, 204))


def row(pixels: torch.Tensor, detections: list[torch.Tensor], names: dict[int, str], title: str) -> np.ndarray:
    """Images (B, 3, S, S), 0 to 1, side by side with their detections (n, 6) and a title above, BGR."""
    canvas = np.full((BAND + SIDE, COLUMNS * (SIDE + GAP) - GAP, 3), 255, np.uint8)
    cv2.putText(canvas, title, (2, BAND - 9), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40), 1, cv2.LINE_AA)
    for column, (image, boxes) in enumerate(zip(pixels, detections, strict=True)):
        picture = (image.permute(1, 2, 0).numpy()[..., ::-1] * 255).round().astype(np.uint8)
        picture = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        for *corners, confidence, label in boxes[boxes[:, 4] > CONFIDENCE].tolist():
            left, top, right, bottom = (round(value * SIDE / image.shape[2]) for value in corners)
            colour = COLOURS[int(label) % len(COLOURS)]
            cv2.rectangle(picture, (left, top), (right, bottom), colour, 2, cv2.LINE_AA)
            text, place = f"{names[int(label)]} {confidence:.2f}", (max(min(left, SIDE - 76), 0), max(top - 4, 10))
            cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 3, cv2.LINE_AA)
            cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
        start = column * (SIDE + GAP)
        canvas[BAND:, start : start + SIDE] = picture
    return canvas


def main(folder: str) -> None:
    """Draws evenly spaced validation images of the run in ``folder``; none is chosen for what it shows."""
    run = read_run(Path(folder))
    pixels, labels, _ = pick(validation_images(run, 32), COLUMNS)
    names = load_dataset_yaml(run.options["data"]).names
    rows = []
    for title, weights in (("float", run.float_weights), ("4-bit weights and activations", run.best_weights)):
        detections = detect_all(weights, pixels)
        found = sum(int(found_labels(*pair)[1].sum()) for pair in zip(detections, labels, strict=True))
        print(f"{title}: {found} of {sum(map(len, labels))} shapes found")
        rows.append(row(pixels, detections, names, title))
    cv2.imwrite(str(FILE), np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    main(sys.argv[1])
