"""`predictions.json`: detections as COCO results, with the tables that make the file complete by itself.

    {"results": [{"image_id": 1, "category_id": 3, "category": "chair", "bbox": [x, y, width, height],
                  "score": 0.87}, …],
     "images": [{"id": 1, "file_name": "a/0001.jpg", "width": 480, "height": 392, "objects": 4}, …],
     "categories": [{"id": 3, "name": "chair"}, …],
     "info": {"job": …, "version": …, "sha256": …, "complete": true, "unreadable": […], …}}

https://cocodataset.org/#format-results. docs/predict.md explains every field. It is written as detections come, so that
its length costs no memory.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detection.evaluate import Found


class ResultsFile:
    """A file of results that appears when it is closed. A context manager; all methods raise OSError.

    If its body raises, what was there so far is kept, with `complete` false. Counts are for whoever reports them.
    """

    def __init__(self, path: Path, classes: Sequence[str], info: Mapping[str, Any]) -> None:
        self.images = 0
        self.objects: Counter[str] = Counter()
        self.unreadable: list[dict[str, str]] = []
        self._path, self._classes, self._info = path, classes, info
        self._part = path.with_name(f"{path.name}.part")

    def add(self, file_name: str, width: int, height: int, found: Found, **more: object) -> None:
        """One image and what is in it. `more` goes into its entry; boxes are rounded to 0.01 pixels."""
        self.images += 1
        entry = {"id": self.images, "file_name": file_name, "width": width, "height": height, **more}
        self._write(self._tables, entry | {"objects": len(found.scores)}, self.images == 1)
        rows = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
        for (left, top, right, bottom), label, score in rows:
            name = self._classes[label - 1]
            result = {
                "image_id": self.images,
                "category_id": label,
                "category": name,
                "bbox": [round(left, 2), round(top, 2), round(right - left, 2), round(bottom - top, 2)],
                "score": round(score, 4),
            }
            self._write(self._file, result, not self.objects)
            self.objects[name] += 1

    def add_unreadable(self, file_name: str, reason: str) -> None:
        self.unreadable.append({"file_name": file_name, "reason": reason})

    def __enter__(self) -> ResultsFile:
        self._file: IO[str] = self._part.open("w", encoding="utf-8")
        self._tables: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._file.write('{"results": [')
        return self

    def __exit__(self, kind: object, exc: object, trace: object) -> None:
        with self._file as file, self._tables as tables:
            file.write('\n],\n"images": [')
            tables.seek(0)
            shutil.copyfileobj(tables, file)
            categories = [{"id": i, "name": name} for i, name in enumerate(self._classes, start=1)]
            info = {**self._info, "complete": kind is None, "unreadable": self.unreadable}
            file.write(f'\n],\n"categories": {json.dumps(categories)},\n"info": {json.dumps(info)}}}\n')
        os.replace(self._part, self._path)

    def _write(self, file: IO[str], row: object, first: bool) -> None:
        file.write(f"{'' if first else ','}\n{json.dumps(row)}")
