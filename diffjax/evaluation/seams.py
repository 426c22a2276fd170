"""Whether the windows show of which long clips are made: the differences of frames at their joins among all others.

Of a clip x_1 ... x_T let d_k be the mean of |x_{k+1} - x_k|, k = 1 ... T - 1 = M, and r_k the rank of d_k among them,
ties sharing theirs. The figure is the mean over the m joins and N clips of

    u_k = (r_k - 1/2) / M,    E u = 1/2                                                                             (1)

where joins are like other places: each of the ranks is as likely there. It is 1 - m / 2M where the m largest
differences are the joins. One clip's mean then has the variance, of a sample of m without replacement from M ranks
(Wilcoxon 1945; Mann & Whitney 1947),

    (M + 1) (M - m) / (12 m M^2)                                                                                    (2)

if the order of d_1 ... d_M says nothing. In clips it does: neighbouring differences are alike. So the standard error
is taken from the spread of the clips' means, which are independent of each other.
"""

from collections.abc import Sequence

import numpy as np


def seam_figures(clips: np.ndarray, joins: Sequence[int]) -> dict[str, float]:
    """uint8 [N, T, H, W, C]; joins: k, for the steps from frame k to k + 1, counted from 0.

    seam_rank         the mean of (1): 0.5 where no seam shows, and more where frames jump at joins
    seam_rank_error   its standard error, of two clips or more
    seam_ratio        the mean difference at joins over the mean difference elsewhere
    """
    differences, joins = frame_differences(clips), np.asarray(joins)
    number = differences.shape[1]
    if not len(joins) or len(joins) == number:
        raise ValueError(f'seams are looked for at some of the {number} steps between frames, got {joins.tolist()}')
    ranks = np.array([_ranks(row) for row in differences])
    means = ((ranks[:, joins] - 0.5) / number).mean(1)
    elsewhere = np.delete(differences, joins, axis=1).mean()
    figures = {'seam_rank': float(means.mean())}
    if len(means) > 1:
        figures['seam_rank_error'] = float(means.std(ddof=1) / np.sqrt(len(means)))
    ratio = differences[:, joins].mean() / elsewhere if elsewhere else float('nan')
    return figures | {'seam_ratio': float(ratio)}


def frame_differences(clips: np.ndarray) -> np.ndarray:
    """The mean of |x_{k+1} - x_k| in bytes: [N, T, H, W, C] -> [N, T - 1]."""
    return np.array([np.abs(np.diff(clip.astype(np.float32), axis=0)).mean((1, 2, 3)) for clip in clips], np.float64)


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1 on; equal values share the mean of theirs."""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal + 1) / 2
