"""A part of a site's images that it measures with and never trains on.

Which part an image belongs to follows from its content alone, so it stays there when other images come or go or
when files are renamed, and copies of an image are never on both sides. Pictures of one camera taken seconds apart
are no copies: where a site has such, validation images of another day are the fairer choice.
"""

from __future__ import annotations

from detection.dataset import Dataset
from federation.errors import BadDataset

MAX_NAMED = 5


def hold_out(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset | None]:
    """What to train on, and what to measure with: about `fraction`, 0 to 1, of the images.

    None if no image with a box is among the latter. Raises BadDataset if none is left to train on.
    """
    held = [int(item.sha256[:16], 16) < fraction * 2**64 for item in dataset.items]
    training = dataset.part(index for index, out in enumerate(held) if not out)
    validation = dataset.part(index for index, out in enumerate(held) if out)
    if not training.num_boxes:
        raise BadDataset(
            f"of {dataset.num_examples} images, {validation.num_examples} are held out, and the others have no box "
            "to train on: lower site_eval_fraction"
        )
    return training, validation if validation.num_boxes else None


def require_apart(training: Dataset, validation: Dataset) -> None:
    """Raises BadDataset if an image is in both."""
    trained = {item.sha256 for item in training.items}
    both = [item.path for item in validation.items if item.sha256 in trained]
    if both:
        named = ", ".join(str(path) for path in both[:MAX_NAMED]) + (" …" if len(both) > MAX_NAMED else "")
        raise BadDataset(
            f"{len(both)} images are trained on and validated with: {named}; take them out of one of the two sets"
        )
