"""Labels of whole data sets: how many classes they mean, and whether the parts of a set agree."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dynanet.core.errors import DataError

FEW = 1000  # classes that labels may always mean, however many of them are met
GAPS = 10  # else, classes per class that is met


def count_classes(labels: Tensor) -> int:
    """The number of classes that labels 0, 1, 2, ... mean: one more than the greatest.

    Args:
        labels: (N,) int64, none negative.

    Raises:
        DataError: identifiers with large gaps; no class is made of a gap.
    """
    if not len(labels):
        return 0
    count = int(labels.max()) + 1
    met = len(labels.unique()) if count > FEW else count
    if count > max(FEW, GAPS * met):
        raise DataError(
            f"{met} different labels reach up to {count - 1}: identifiers, not the numbers of classes; number the "
            f"classes 0, 1, 2, ..."
        )
    return count


def check_parts(classes: Sequence[str], others: Mapping[str, tuple[Sequence[str], Tensor]]) -> None:
    """Refuse a part of a data set whose classes are not those of training.

    Args:
        classes: of the training part.
        others: classes and labels (N,) of the other parts, by name. A part may lack the last classes.

    Raises:
        DataError: other names, another order, or a label that training does not have.
    """
    for part, (names, labels) in others.items():
        most = int(labels.max()) if len(labels) else -1
        if most >= len(classes):
            raise DataError(
                f"the {part} part has the class {most}, and training has {len(classes)} classes; add training samples "
                f"of it, or remove it"
            )
        if list(names[: len(classes)]) != list(classes[: len(names)]):
            first = next(k for k, (one, other) in enumerate(zip(names, classes, strict=False)) if one != other)
            raise DataError(
                f"the {part} part calls class {first} {names[first]!r}, and training calls it {classes[first]!r}; give "
                f"all parts the same classes in the same order"
            )
