"""torch.hub's entry points: ``torch.hub.load("path/to/this/folder", "custom", "best.pt", source="local")``."""

dependencies = ["torch", "torchvision", "numpy", "cv2", "yaml"]


def custom(path, autoshape=True, _verbose=True, device=None, **settings):
    """A detector from any weights file; see ``models.load.load``. Settings: conf, iou, max_det, classes ...

    ``autoshape`` and ``_verbose`` are YOLOv5's. Raises UserError for ``autoshape=False``, a bare network.
    """
    from models.load import load
    from utils.errors import UserError

    if not autoshape:
        raise UserError("autoshape=False: for a bare network take models.backend.load_network(path)[0]")
    return load(path, device or "", **settings)


def _official(name):
    def entry(pretrained=True, channels=3, classes=80, autoshape=True, _verbose=True, device=None, **settings):
        from utils.errors import UserError

        if not pretrained or channels != 3 or (classes != 80 and not isinstance(classes, list)):
            raise UserError(
                f"{name}: only the official weights come from here (pretrained=True, channels=3, classes=80); a list "
                f"of classes keeps those. A new network is DetectionModel('{name}.yaml', nc=...) of models.yolo"
            )
        chosen = {"classes": classes} if isinstance(classes, list) else {}
        return custom(f"{name}.pt", autoshape, _verbose, device, **chosen, **settings)

    entry.__name__ = name
    entry.__doc__ = f"YOLOv5's official {name}, fetched from its releases where {name}.pt is not there."
    return entry


yolov5n, yolov5s, yolov5m, yolov5l, yolov5x = (_official(f"yolov5{size}") for size in "nsmlx")
yolov5n6, yolov5s6, yolov5m6, yolov5l6, yolov5x6 = (_official(f"yolov5{size}6") for size in "nsmlx")
