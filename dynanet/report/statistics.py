"""Agreement of answers with labels, and confidence intervals."""

import math

import numpy as np

NORMAL_95 = 1.959964


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent samples (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z = NORMAL_95**2 / n
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_margin(values: np.ndarray) -> float:
    """Half of the 95 % interval of the mean of (n,) independent values, by the normal approximation."""
    return float(NORMAL_95 * values.std() / math.sqrt(len(values)))


def class_mean(labels: np.ndarray, answers: np.ndarray) -> float:
    """The mean accuracy of the classes that occur ("average accuracy" in remote sensing)."""
    return float(np.mean([(answers[labels == c] == c).mean() for c in np.unique(labels)]))


def kappa(labels: np.ndarray, answers: np.ndarray) -> float:
    """Cohen's kappa: agreement beyond the chance agreement of the class shares; NaN for a single class."""
    classes = max(labels.max(), answers.max()) + 1
    truth, said = (np.bincount(each, minlength=classes) / len(labels) for each in (labels, answers))
    chance = float(truth @ said)
    return float("nan") if chance == 1 else (float((labels == answers).mean()) - chance) / (1 - chance)
