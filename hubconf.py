"""torch.hub's entry points: ``torch.hub.load("path/to/this/folder", "custom", "best.pt", source="local")``."""

dependencies = ["torch", "torchvision", "numpy", "cv2", "yaml"]


def custom(path, device="", **settings):
    """A detector from any weights file; see ``models.load.load``. Settings: conf, iou, max_det, classes ..."""
    from models.load import load

    return load(path, device or "", **settings)


def _official(name):
    def entry(device="", **settings):
        return custom(f"{name}.pt", device, **settings)

    entry.__name__ = name
    entry.__doc__ = f"YOLOv5's official {name}, fetched from its releases where {name}.pt is not there."
    return entry


yolov5n, yolov5s, yolov5m, yolov5l, yolov5x = (_official(f"yolov5{size}") for size in "nsmlx")
yolov5n6, yolov5s6, yolov5m6, yolov5l6, yolov5x6 = (_official(f"yolov5{size}6") for size in "nsmlx")
