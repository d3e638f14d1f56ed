"""Conversion between the label formats of YOLO, PASCAL VOC and COCO; ``python -m utils.convert --help``."""
