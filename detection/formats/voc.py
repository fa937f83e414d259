"""Pascal VOC XML, one file per image. http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html

    Annotations/000001.xml      <annotation><filename>000001.jpg</filename>
    JPEGImages/000001.jpg         <size><width>480</width><height>392</height><depth>3</depth></size>
                                  <object><name>chair</name>
                                    <bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox>
                                  </object></annotation>

VOC counts pixels from 1 and xmax, ymax are the last ones inside, so the box above is (10, 20, 40, 60) here: 1 is taken
off xmin and ymin. Objects marked `difficult` or `truncated` are objects. A file with a DOCTYPE is refused unread:
entities can be declared nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from os.path import isfile
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree as ET

from detection.annotations import Annotations, Box, Corners, Picture, is_inside
from detection.formats.files import read_bytes, require_unique_stems, without_suffix, write_text
from federation.errors import BadDataset

ANNOTATIONS = "Annotations"
IMAGES = "JPEGImages"
FIELDS = "fields"
"""An element of ours, `<fields><field name="device">3</field></fields>`: VOC has no place for the camera's id."""


class _NoDoctype(ET.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise BadDataset("has a DOCTYPE, which annotations do not need and which is not read: remove it")


def read(path: Path, images: Path | None) -> Annotations:
    """Read every XML file below the folder `path`, or below its `Annotations`. Raises BadDataset if there is none."""
    folder = path / ANNOTATIONS if (path / ANNOTATIONS).is_dir() else path
    annotations = Annotations(path)
    files = sorted(folder.rglob("*.xml"))
    if not files:
        raise BadDataset(f"{folder}: holds no XML files")
    for file in files:
        try:
            picture = _picture(file, file.relative_to(folder).parent, images, annotations)
        except BadDataset as exc:
            annotations.defect("unreadable annotations", str(exc), file)
            continue
        if picture is not None:
            annotations.pictures.append(picture)
    annotations.classes = tuple(sorted({box.name for p in annotations.pictures for box in p.boxes}))
    return annotations


def write(pictures: Sequence[Picture], classes: Sequence[str], folder: Path) -> Path:
    """Write `folder`/Annotations/*.xml. Coordinates with decimals where they have some, to 1/10,000 pixel."""
    require_unique_stems(picture.name for picture in pictures)
    for picture in pictures:
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = PurePosixPath(picture.name).name
        _children(ET.SubElement(root, "size"), width=picture.width, height=picture.height, depth=3)
        ET.SubElement(root, "segmented").text = "0"
        if picture.fields:
            fields = ET.SubElement(root, FIELDS)
            for key, value in picture.fields.items():
                ET.SubElement(fields, "field", name=key).text = str(value)
        for box in picture.boxes:
            left, top, right, bottom = box.corners
            entry = ET.SubElement(root, "object")
            _children(entry, name=box.name, pose="Unspecified", truncated=0, difficult=0)
            _children(
                ET.SubElement(entry, "bndbox"),
                xmin=_decimal(left + 1),
                ymin=_decimal(top + 1),
                xmax=_decimal(right),
                ymax=_decimal(bottom),
            )
        ET.indent(root)
        text = ET.tostring(root, encoding="unicode") + "\n"
        write_text(folder / ANNOTATIONS / f"{without_suffix(picture.name)}.xml", text)
    return folder


def _picture(file: Path, parent: Path, images: Path | None, annotations: Annotations) -> Picture | None:
    """One file; notes a defect and returns None if it does not say which image it is about."""
    root = _parse(file)
    if root.tag != "annotation":
        raise BadDataset(f"is not Pascal VOC: the outermost element is <{root.tag}>, not <annotation>")
    name = (root.findtext("filename") or "").strip()
    if not is_inside(name):
        annotations.defect(
            "bad entry", f"<filename> must be a path inside the image folder, is {name!r}", file
        )
        return None
    beside = (parent / name).as_posix()
    if images is None or isfile(images / beside) or not isfile(images / name):
        name = beside
    width, height = (_whole(root.findtext(f"size/{side}")) for side in ("width", "height"))
    if not width or not height:
        annotations.defect("bad entry", "<size> must give width and height in pixels, above 0", file)
        return None
    boxes = []
    for number, entry in enumerate(root.iterfind("object"), start=1):
        where = f"object {number}"
        label, corners = (entry.findtext("name") or "").strip(), _corners(entry.find("bndbox"))
        if not label:
            annotations.defect("unknown class", f"{where}: has no <name>", file)
        elif corners is None:
            annotations.defect(
                "not a box", f"{where}: <bndbox> must give xmin, ymin, xmax, ymax as finite numbers", file
            )
        else:
            boxes.append(Box(label, corners, where))
    fields = {entry.get("name", ""): entry.text or "" for entry in root.iterfind(f"{FIELDS}/field")}
    return Picture(name, width, height, tuple(boxes), fields, file.name)


def _parse(file: Path) -> ET.Element:
    data = read_bytes(file)
    try:
        return ET.fromstring(data, parser=ET.XMLParser(target=_NoDoctype()))
    except (ET.ParseError, ValueError, LookupError) as exc:  # LookupError: an encoding that nobody knows
        raise BadDataset(f"is not XML: {exc}") from exc


def _whole(text: str | None) -> int | None:
    try:
        return max(int(float(text or "")), 0)
    except (ValueError, OverflowError):
        return None


def _corners(bndbox: ET.Element | None) -> Corners | None:
    if bndbox is None:
        return None
    try:
        left, top, right, bottom = (
            float(bndbox.findtext(side) or "") for side in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return None
    corners = (left - 1, top - 1, right, bottom)
    return corners if all(isfinite(value) for value in corners) else None


def _children(parent: ET.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ET.SubElement(parent, tag).text = str(text)


def _decimal(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")
