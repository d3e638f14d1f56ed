"""PASCAL VOC's layout (The PASCAL Visual Object Classes Challenge 2007 Development Kit) to YOLO's and back.

A VOC folder holds JPEGImages/NAME.jpg, Annotations/NAME.xml and ImageSets/Main/SET.txt with one NAME a line. A box's
corners are pixels, counted from 1, both of them inside of it: xmin 1, xmax 10 is ten pixels wide and has its edges at
0 and 10. Tools that write VOC's format for other data, such as labelImg, mean edges, counted from 0: that is what
``corners="edges"`` stands for.
"""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.convert.files import (
    Box,
    Counts,
    LabelledImage,
    box_line,
    clip,
    read_labelled,
    safe_name,
    transfer_image,
    write_lines,
)
from utils.difficult import difficult_path
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, read_image
from utils.labels import READERS, label_path
from utils.progress import progress
from utils.threads import ThreadPool

CORNERS = ("pixels", "edges")
LARGEST_XML = 10_000_000  # bytes; annotations of VOC have 1 to 20 thousand


@dataclass
class VocObject:
    name: str
    box: Box  # edges in pixels, 0 at the image's own
    difficult: bool = False


@dataclass
class VocAnnotation:
    """One XML file; width and height are 0 where it does not say them."""

    file: Path
    width: int = 0
    height: int = 0
    file_name: str = ""
    objects: list[VocObject] = field(default_factory=list)


def read_annotation(file: Path, corners: str = "pixels") -> VocAnnotation:
    """Reads an annotation. Entities and external references, which no annotation needs, are refused.

    Raises:
        UserError: unreadable, no XML, or a box without the numbers it needs.
    """
    try:
        content = file.read_bytes()
        # NUL bytes: in UTF-16 the next test would not find what it looks for.
        if len(content) > LARGEST_XML or b"\0" in content or re.search(rb"<!(DOCTYPE|ENTITY)", content):
            raise UserError(f"{file}: is no annotation: too long, not UTF-8, or with a document type of its own.")
        root = ElementTree.fromstring(content)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: is not valid XML ({error}).") from None
    size = [root.findtext(f"size/{side}") or "0" for side in ("width", "height")]
    result = VocAnnotation(file, *(int(_number(text, file, "size")) for text in size), root.findtext("filename") or "")
    for item in root.findall("object"):  # direct children only: the parts of a person are objects inside of it
        name = (item.findtext("name") or "").strip()
        values = [
            _number(item.findtext(f"bndbox/{key}"), file, f"{name}'s {key}") for key in ("xmin", "ymin", "xmax", "ymax")
        ]
        if corners == "pixels":
            values[0], values[1] = values[0] - 1, values[1] - 1
        result.objects.append(VocObject(name, tuple(values), (item.findtext("difficult") or "0").strip() == "1"))
    return result


def _number(text: str | None, file: Path, what: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{file}: {what} is {text!r}, not a number.")
    return value


def write_annotation(annotation: VocAnnotation, corners: str = "pixels") -> None:
    """Writes an annotation; coordinates are rounded to whole pixels, as readers of the format expect."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "folder").text = annotation.file.parent.parent.name
    ElementTree.SubElement(root, "filename").text = annotation.file_name
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", annotation.width), ("height", annotation.height), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    ElementTree.SubElement(root, "segmented").text = "0"
    for item in annotation.objects:
        element = ElementTree.SubElement(root, "object")
        fields = (
            ("name", item.name),
            ("pose", "Unspecified"),
            ("truncated", "0"),
            ("difficult", str(int(item.difficult))),
        )
        for key, value in fields:
            ElementTree.SubElement(element, key).text = value
        left, top, right, bottom = (round(value) for value in item.box)
        # A box narrower than half a pixel keeps the one it lies in.
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        first = 1 if corners == "pixels" else 0
        box = ElementTree.SubElement(element, "bndbox")
        for key, value in (("xmin", left + first), ("ymin", top + first), ("xmax", right), ("ymax", bottom)):
            ElementTree.SubElement(box, key).text = str(value)
    ElementTree.indent(root)
    write_lines(annotation.file, [ElementTree.tostring(root, encoding="unicode")])


# --- VOC to YOLO
def image_sets(source: Path) -> list[str]:
    """Which of train, val and test a VOC folder has; where it has none of them, all its sets but ``trainval``."""
    folder = source / "ImageSets" / "Main"
    names = sorted(file.stem for file in folder.glob("*.txt"))
    plain = [name for name in names if name in ("train", "val", "test")]
    return plain or [name for name in names if name != "trainval"]


def set_members(source: Path, image_set: str) -> list[str]:
    """The names in ``ImageSets/Main/SET.txt``.

    Raises:
        UserError: there is no such set, or a name that leaves its folder.
    """
    file = source / "ImageSets" / "Main" / f"{image_set}.txt"
    if not file.is_file():
        raise UserError(f"{file}: no such image set. There are: {', '.join(image_sets(source)) or 'none'}.")
    lines = [line.strip() for line in file.read_text("utf-8-sig", "replace").splitlines() if line.strip()]
    # Sets of single classes have a second column: -1, 0 or 1.
    return [safe_name(re.sub(r"\s+-?[01]$", "", line), file) for line in lines]


def class_names(sources: Iterable[Path]) -> list[str]:
    """All names that occur in the annotations of some VOC folders, sorted."""
    files = [file for source in sources for file in sorted((source / "Annotations").glob("*.xml"))]
    return sorted({item.name for file in files for item in read_annotation(file).objects})


def voc_to_yolo(
    source: Path, image_set: str, output: Path, set_name: str, names: Sequence[str],
    *, corners: str = "pixels", train_difficult: bool = False, transfer: str = "copy",
) -> Counts:  # fmt: skip
    """Converts one image set to ``images/SET``, ``labels/SET`` and, for difficult objects, ``difficult/SET``.

    Args:
        source: the folder with JPEGImages, Annotations and ImageSets.
        set_name: the set's name in ``output``.
        names: the classes in order; objects of others are left out and counted.
        corners: what the numbers mean: "pixels" as in VOC, or "edges".
        train_difficult: write difficult objects into the labels like all others.
        transfer: how images get to ``output``: "copy", "move" or "link".

    Raises:
        UserError: files missing or unreadable; nothing in the set can be used.
    """
    members, counts = set_members(source, image_set), Counts()
    numbers = {name: index for index, name in enumerate(names)}
    safe_name(set_name, output)

    def convert(member: str) -> tuple[str, VocAnnotation | None, Path | None]:
        file = source / "Annotations" / f"{member}.xml"
        annotation = read_annotation(file, corners) if file.is_file() else None
        return member, annotation, _find_image(source, member, annotation)

    with ThreadPool(READERS) as pool:
        for member, annotation, image in progress(pool.map(convert, members), set_name, len(members)):
            if image is None:
                counts.missing += 1
                continue
            counts.images += 1
            target = output / "images" / set_name / f"{member}{image.suffix}"
            if annotation is not None:
                if not (annotation.width > 0 and annotation.height > 0):
                    annotation.height, annotation.width = read_image(image).shape[:2]
                _write_labels(annotation, target, numbers, counts, train_difficult)
            else:
                counts.unlabelled += 1
            transfer_image(image, target, transfer)
    if not counts.images:
        raise UserError(f"{source}: none of the {len(members)} images of '{image_set}' is in {source / 'JPEGImages'}.")
    return counts


def _find_image(source: Path, member: str, annotation: VocAnnotation | None) -> Path | None:
    folder = source / "JPEGImages"
    suffixes = [".jpg", Path(annotation.file_name).suffix if annotation else "", *sorted(IMAGE_SUFFIXES)]
    candidates = (folder / f"{member}{suffix}" for suffix in suffixes if suffix.lower() in IMAGE_SUFFIXES)
    return next((file for file in candidates if file.is_file()), None)


def _write_labels(
    annotation: VocAnnotation, image: Path, numbers: Mapping[str, int], counts: Counts, train_difficult: bool
) -> None:
    lines: dict[bool, list[str]] = {False: [], True: []}
    for item in annotation.objects:
        box = clip(item.box, annotation.width, annotation.height)
        if item.name not in numbers:
            counts.leave_out(f"class '{item.name}' is not among the names")
        elif box is None:
            counts.leave_out("box without extent in the image")
        else:
            apart = item.difficult and not train_difficult
            lines[apart].append(box_line(numbers[item.name], box, annotation.width, annotation.height))
    counts.boxes += len(lines[False])
    counts.difficult += len(lines[True])
    counts.background += not (lines[False] or lines[True])
    write_lines(Path(label_path(image)), lines[False])
    if lines[True]:
        write_lines(difficult_path(image), lines[True])


# --- YOLO to VOC
def yolo_to_voc(
    images: Sequence[str | Path], names: Mapping[int, str], output: Path, image_set: str,
    *, corners: str = "pixels", transfer: str | None = "copy",
) -> Counts:  # fmt: skip
    """Converts images with YOLO labels to a VOC folder; the rows in ``difficult`` become difficult objects.

    Args:
        images: paths whose labels lie where YOLO looks for them. VOC has one folder: no two may share a stem.
        transfer: "copy", "move" or "link" the images to JPEGImages; None leaves them where they are.

    Raises:
        UserError: an unreadable image, a wrong label, a class without a name, two images of one stem.
    """
    counts, seen = Counts(), {}
    for image in progress([Path(image) for image in images], image_set):
        if image.stem in seen:
            raise UserError(f"{image} and {seen[image.stem]}: VOC keeps all images in one folder; rename one of them.")
        seen[image.stem] = image
        labelled = read_labelled(image, Path(label_path(image)))
        objects = voc_objects(labelled, names, False)
        counts.boxes += len(objects)
        apart = voc_objects(read_labelled(image, difficult_path(image), (labelled.width, labelled.height)), names, True)
        counts.images += 1
        counts.difficult += len(apart)
        counts.background += not (objects or apart)
        file = output / "Annotations" / f"{image.stem}.xml"
        write_annotation(VocAnnotation(file, labelled.width, labelled.height, image.name, objects + apart), corners)
        if transfer is not None:
            transfer_image(image, output / "JPEGImages" / image.name, transfer)
    write_lines(output / "ImageSets" / "Main" / f"{image_set}.txt", seen)
    return counts


def voc_objects(labelled: LabelledImage, names: Mapping[int, str], difficult: bool) -> list[VocObject]:
    """The objects of an image with their names; an outline is reduced to its box."""
    unknown = set(labelled.classes) - set(names)
    if unknown:
        raise UserError(
            f"{labelled.path}: its labels name class {min(unknown)}; the data set has {len(names)} classes."
        )
    return [
        VocObject(names[label], box, difficult) for label, box in zip(labelled.classes, labelled.boxes, strict=True)
    ]
