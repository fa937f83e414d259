"""VOC2010 AP against examples that are computed by hand, and against the development kit's loop, written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from detection.voc import area, average_precision, hits, iou

Array = NDArray[np.float64]

BOX = [0.0, 0.0, 10.0, 10.0]
FAR = [100.0, 100.0, 110.0, 110.0]


def boxes(*rows: list[float]) -> Array:
    return np.array(rows, np.float64).reshape(-1, 4)


def one_image(truth: Array, found: Array, scores: list[float]) -> float:
    return average_precision([truth], [found], [np.array(scores)])


def test_overlap_of_boxes() -> None:
    a = boxes(BOX, [0, 0, 5, 10], FAR, [3, 3, 3, 3])
    expected = [[1.0, 0.5, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert iou(a, a).tolist() == expected
    assert iou(a, boxes()).shape == (4, 0)


@pytest.mark.parametrize(
    ("true", "count", "ap"),
    [
        ([], 3, 0.0),
        ([0, 0], 1, 0.0),
        ([1], 1, 1.0),
        ([1], 2, 0.5),
        ([0, 1], 1, 0.5),
        ([1, 0, 1], 2, (1 + 2 / 3) / 2),
        ([0, 1, 1], 2, 2 / 3),  # the dip before the second is filled by what comes after it
        ([1, 0, 0, 1, 1, 0], 5, (1 + 3 / 5 + 3 / 5) / 5),
    ],
)
def test_area_by_hand(true: list[int], count: int, ap: float) -> None:
    assert area(np.array(true, np.bool_), count) == pytest.approx(ap, abs=1e-15)


def test_a_box_is_found_once() -> None:
    assert one_image(boxes(BOX, FAR), boxes(BOX, BOX, FAR), [0.9, 0.8, 0.7]) == pytest.approx((1 + 2 / 3) / 2)


def test_a_detection_belongs_to_the_box_it_overlaps_most_found_or_not() -> None:
    """COCO would give the second detection the second box, which it overlaps by 2/3."""
    truth = boxes(BOX, [2, 0, 12, 10])
    assert one_image(truth, boxes(BOX, BOX), [0.9, 0.8]) == 0.5


def test_half_overlap_is_enough_and_less_is_not() -> None:
    assert one_image(boxes(BOX), boxes([0, 0, 10, 5]), [0.9]) == 1.0
    assert one_image(boxes(BOX), boxes([0, 0, 10, 4.999]), [0.9]) == 0.0


def test_equal_scores_go_by_image_and_then_by_detection() -> None:
    good, bad = (boxes(BOX), boxes(BOX), np.array([0.5])), (boxes(), boxes(FAR), np.array([0.5]))
    truth, found, scores = zip(good, bad, strict=True)
    assert average_precision(truth, found, scores) == 1.0
    assert average_precision(truth[::-1], found[::-1], scores[::-1]) == 0.5
    assert one_image(boxes(BOX), boxes(FAR, BOX), [0.5, 0.5]) == 0.5


def test_scores_rank_over_all_images() -> None:
    truth = [boxes(BOX), boxes(BOX)]
    found = [boxes(FAR, BOX), boxes(BOX)]
    assert average_precision(truth, found, [np.array([0.1, 0.8]), np.array([0.9])]) == 1.0
    assert average_precision(truth, found, [np.array([0.85, 0.8]), np.array([0.9])]) == pytest.approx(5 / 6)


def test_nothing_found_and_nothing_there() -> None:
    assert average_precision([boxes(BOX), boxes()], [boxes(), boxes()], [np.zeros(0), np.zeros(0)]) == 0.0
    with pytest.raises(ValueError, match="without ground truth"):
        average_precision([boxes()], [boxes(BOX)], [np.ones(1)])


def reference(truth: list[Array], found: list[Array], scores: list[Array]) -> float:
    """VOCevaldet.m and VOCap.m, line by line, with our edges for their pixels and `>=` as there."""
    everything = [
        (score, i, box) for i, image in enumerate(found) for box, score in zip(image, scores[i], strict=True)
    ]
    everything.sort(key=lambda one: -one[0])
    detected = [[False] * len(image) for image in truth]
    npos = sum(map(len, truth))
    tp = fp = 0
    recall, precision = [0.0], [0.0]
    for _, i, bb in everything:
        ovmax, jmax = -1.0, -1
        for j, bbgt in enumerate(truth[i]):
            iw = min(bb[2], bbgt[2]) - max(bb[0], bbgt[0])
            ih = min(bb[3], bbgt[3]) - max(bb[1], bbgt[1])
            if iw > 0 and ih > 0:
                ua = (bb[2] - bb[0]) * (bb[3] - bb[1]) + (bbgt[2] - bbgt[0]) * (bbgt[3] - bbgt[1]) - iw * ih
                if iw * ih / ua > ovmax:
                    ovmax, jmax = iw * ih / ua, j
        if ovmax >= 0.5 and not detected[i][jmax]:
            tp += 1
            detected[i][jmax] = True
        else:
            fp += 1
        recall.append(tp / npos)
        precision.append(tp / (tp + fp))
    mrec, mpre = [*recall, 1.0], [*precision, 0.0]
    for k in range(len(mpre) - 2, -1, -1):
        mpre[k] = max(mpre[k], mpre[k + 1])
    return sum((mrec[k] - mrec[k - 1]) * mpre[k] for k in range(1, len(mrec)) if mrec[k] != mrec[k - 1])


@st.composite
def image(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """Few places and sizes on a grid, so that overlaps of exactly one half, duplicates and equal scores are common."""
    box = st.builds(
        lambda x, y, w, h: [x, y, x + w, y + h],
        *[st.integers(0, 4).map(float)] * 2,
        *[st.integers(1, 4).map(float)] * 2,
    )
    truth = draw(st.lists(box, max_size=4))
    found = draw(st.lists(st.tuples(box, st.sampled_from([0.1, 0.5, 0.5, 0.9])), max_size=6))
    return boxes(*truth), boxes(*(b for b, _ in found)), np.array([s for _, s in found])


@given(st.lists(image(), min_size=1, max_size=4).filter(lambda images: any(len(i[0]) for i in images)))
def test_the_kit_says_the_same(images: list[tuple[Array, Array, Array]]) -> None:
    truth, found, scores = (list(part) for part in zip(*images, strict=True))
    assert average_precision(truth, found, scores) == pytest.approx(
        reference(truth, found, scores), abs=1e-12
    )


def test_hits_come_in_the_order_of_the_ranking() -> None:
    found = boxes(FAR, BOX, BOX)
    assert hits([boxes(BOX)], [found], np.array([2, 0, 1])).tolist() == [True, False, False]
