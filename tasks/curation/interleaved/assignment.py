"""Which text each image of a document belongs to: MMC4's assignment by similarity.

Source: Zhu et al. 2023, "Multimodal C4"; its `compute_assignments.py` pads the matrix to a square, which comes to the
same.
"""

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment


def assign(similarity: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Return for each image the number of its text, given cosines of shape (images, texts); -1 where there are none.

    One-to-one with the largest sum of similarities; of more images than texts, those left over go to the text most
    similar to each, the first of equals.
    """
    images, texts = similarity.shape
    assigned = np.full(images, -1, np.int64)
    if not texts:
        return assigned
    rows, columns = linear_sum_assignment(-similarity.astype(np.float64))
    assigned[rows] = columns
    left = assigned < 0
    assigned[left] = similarity[left].argmax(axis=1)
    return assigned
