"""Decoded images on disk: what is kept, what is not believed, what makes room."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from detection.cache import DiskCache, MemoryCache
from detection.dataset import Dataset, load_dataset
from federation.errors import BadDataset

SIDE = 16
FILE_BYTES = 128 + 3 * SIDE * SIDE + 4


def digest(i: int) -> str:
    return f"{i:064x}"


def square(i: int, side: int = SIDE) -> NDArray[np.uint8]:
    return np.random.default_rng(i).integers(0, 256, (side, side, 3)).astype(np.uint8)


def test_what_is_put_is_there_in_the_next_process_too(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "c", 10**6)
    assert cache.get(digest(1), SIDE) is None
    cache.put(digest(1), SIDE, square(1))
    for one in (cache, DiskCache(tmp_path / "c", 10**6)):
        kept = one.get(digest(1), SIDE)
        assert kept is not None
        np.testing.assert_array_equal(kept, square(1))
        assert digest(1) in one
        assert digest(2) not in one
        assert one.get(digest(1), SIDE + 1) is None
        assert one.used_bytes == FILE_BYTES


def test_a_file_is_an_ordinary_npy_file_for_the_owner_alone(tmp_path: Path) -> None:
    DiskCache(tmp_path / "c", 10**6).put(digest(1), SIDE, square(1))
    (file,) = (tmp_path / "c").rglob("*.npy")
    np.testing.assert_array_equal(np.load(file, allow_pickle=False), square(1))
    assert file.stat().st_size == FILE_BYTES
    assert (tmp_path / "c").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:100],
        lambda raw: b"",
        lambda raw: raw + b"x",
        lambda raw: bytes(len(raw)),
        lambda raw: raw[:500] + bytes([raw[500] ^ 1]) + raw[501:],
        lambda raw: raw.replace(b"|u1", b"|i1"),
    ],
    ids=["a byte short", "in the header", "empty", "longer", "zeros", "one bit", "other type"],
)
def test_a_damaged_file_is_not_believed_and_made_again(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    DiskCache(tmp_path, 10**6).put(digest(1), SIDE, square(1))
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(damage(file.read_bytes()))
    cache = DiskCache(tmp_path, 10**6)
    assert cache.get(digest(1), SIDE) is None
    assert "is damaged" in caplog.text
    assert cache.used_bytes == 0
    cache.put(digest(1), SIDE, square(1))
    assert cache.get(digest(1), SIDE) is not None


def test_what_another_process_left_half_written_is_swept_away(tmp_path: Path) -> None:
    folder = tmp_path / f"{SIDE}/ab"
    folder.mkdir(parents=True)
    (folder / "abc.77.partial").write_bytes(b"half")
    DiskCache(tmp_path, 10**6)
    assert len(list(folder.iterdir())) == 1, "another agent may be writing it now"
    os.utime(folder / "abc.77.partial", (1000, 1000))
    (folder / "readme.md").write_text("whoever put this here")
    os.utime(folder / "readme.md", (1000, 1000))
    DiskCache(tmp_path, 10**6)
    assert [path.name for path in folder.iterdir()] == ["readme.md"]


def test_a_cache_that_may_not_be_tidied_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    DiskCache(tmp_path, 10**6).put(digest(1), SIDE, square(1))
    cache = DiskCache(tmp_path, FILE_BYTES)
    cache.reserve([digest(2)])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    cache.put(digest(2), SIDE, square(2))
    cache.put(digest(3), SIDE, square(3))
    assert caplog.text.count("cannot be written (Permission denied)") == 1
    assert cache.get(digest(3), SIDE) is None


def test_the_bound_holds_and_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2 * FILE_BYTES)
    cache.reserve(digest(i) for i in range(4))
    for i in range(4):
        cache.put(digest(i), SIDE, square(i))
    assert [cache.get(digest(i), SIDE) is not None for i in range(4)] == [True, True, False, False]
    assert cache.used_bytes == 2 * FILE_BYTES == sum(f.stat().st_size for f in tmp_path.rglob("*.npy"))


def test_other_images_and_other_sizes_make_room_the_oldest_first(tmp_path: Path) -> None:
    earlier = DiskCache(tmp_path, 10**6)
    for i in range(3):
        earlier.put(digest(i), SIDE, square(i))
    for i, file in enumerate(sorted(tmp_path.rglob("*.npy"))):
        os.utime(file, (1000 - i, 1000 - i))  # the last is the oldest
    cache = DiskCache(tmp_path, 3 * FILE_BYTES)
    cache.reserve([digest(1), digest(7), digest(8)])
    cache.put(digest(7), SIDE, square(7))
    assert [digest(i) in _files(tmp_path) for i in (0, 1, 2, 7)] == [True, True, False, True]
    cache.put(digest(8), SIDE, square(8))
    assert [digest(i) in _files(tmp_path) for i in (0, 1, 7, 8)] == [False, True, True, True]
    # a job with another image size: the squares of the last one are of no use
    other = DiskCache(tmp_path, 3 * FILE_BYTES)
    other.reserve([digest(1), digest(7), digest(8)])
    other.put(digest(1), SIDE - 1, square(1, SIDE - 1))
    assert len(_files(tmp_path)) == 3
    assert other.get(digest(1), SIDE - 1) is not None


def _files(folder: Path) -> set[str]:
    return {path.stem for path in folder.rglob("*.npy")}


def test_a_square_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, FILE_BYTES - 1)
    cache.put(digest(1), SIDE, square(1))
    assert cache.get(digest(1), SIDE) is None
    assert list(tmp_path.rglob("*.npy")) == []


def test_a_disk_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(tmp_path, 10**6)
    (tmp_path / str(SIDE)).write_text("in the way")
    for i in range(3):
        cache.put(digest(i), SIDE, square(i))
    assert caplog.text.count("cannot be written") == 1
    assert cache.get(digest(0), SIDE) is None


def test_a_file_that_somebody_removed_is_simply_not_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(tmp_path, 10**6)
    cache.put(digest(1), SIDE, square(1))
    next(tmp_path.rglob("*.npy")).unlink()
    with caplog.at_level(logging.WARNING):
        assert cache.get(digest(1), SIDE) is None
    assert cache.used_bytes == 0


def test_memory_keeps_what_fits(tmp_path: Path) -> None:
    cache: MemoryCache[NDArray[np.uint8]] = MemoryCache(2 * square(0).nbytes)
    images = [Path(f"{i}.png") for i in range(3)]
    for i, image in enumerate(images):
        cache.put(image, SIDE, square(i))
    cache.put(images[0], SIDE, square(9))
    assert [cache.get(image, SIDE) is not None for image in images] == [True, True, False]
    assert cache.used_bytes == cache.limit_bytes


# --- behind a data set ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (80, 60), (40 * i, 90, 120)).save(tmp_path / f"images/{i}.png")
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in (1, 2)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "chair"}],
    }
    (tmp_path / "site.json").write_text(json.dumps(coco))
    return tmp_path


def load(folder: Path, memory: int = 0) -> Dataset:
    disk = DiskCache(folder / "state", 10**6)
    return load_dataset(folder / "site.json", None, ["chair"], cache=MemoryCache(memory), disk=disk)


def test_the_second_start_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [load(folder).square(i, SIDE) for i in range(2)]

    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("detection.dataset.decode_square", refuse)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    again = load(folder)
    assert all(torch.equal(again.square(i, SIDE), first[i]) for i in range(2))


def test_a_changed_image_is_decoded_anew(folder: Path) -> None:
    load(folder).square(0, SIDE)
    Image.new("RGB", (80, 60), (250, 1, 2)).save(folder / "images/1.png")
    assert load(folder).square(0, SIDE)[:, 3, 3].tolist() == [250, 1, 2]


def test_an_image_that_changes_while_in_use_is_kept_under_its_new_content(folder: Path) -> None:
    dataset = load(folder)
    Image.new("RGB", (80, 60), (250, 1, 2)).save(folder / "images/1.png")
    assert dataset.square(0, SIDE)[:, 3, 3].tolist() == [250, 1, 2]
    Image.new("RGB", (80, 60), (40, 90, 120)).save(folder / "images/1.png")
    assert load(folder).square(0, SIDE)[:, 3, 3].tolist() == [40, 90, 120]


def test_an_image_that_changes_its_size_while_in_use_is_refused(folder: Path) -> None:
    dataset = load(folder)
    Image.new("RGB", (60, 80)).save(folder / "images/1.png")
    with pytest.raises(BadDataset, match="is 60x80 and was 80x60 when the data were checked"):
        dataset.square(0, SIDE)


def test_memory_comes_before_the_disk(folder: Path) -> None:
    dataset = load(folder, memory=10**6)
    first = dataset.square(0, SIDE)
    assert dataset.square(0, SIDE) is first
    assert first.shape == (3, SIDE, SIDE)
    assert first.is_contiguous(memory_format=torch.contiguous_format) is False, "channels last"
