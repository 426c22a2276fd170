"""The loss at each noise level on held-out data: where along t a network is good, and where it is not."""

from collections.abc import Callable


def loss_by_noise_level(loss_at: Callable[[float], tuple[float, float]], num_levels: int) -> list[dict[str, float]]:
    """A table with one row, `t, loss, standard_error`, for each of `num_levels` noise levels.

    The levels are the midpoints t_i = (i + 1/2) / num_levels of equal parts of [0, 1]. They avoid t = 0 and t = 1,
    where some losses are singular, and make the mean of the rows the midpoint rule for the integral over t.

    Args:
      loss_at: t -> (mean loss over held-out data at that noise level, its standard error).

    Raises ValueError for num_levels < 1.
    """
    if num_levels < 1:
        raise ValueError(f'num_levels={num_levels} must be at least 1.')
    rows = []
    for i in range(num_levels):
        t = (i + 0.5) / num_levels
        mean, standard_error = loss_at(t)
        rows.append({'t': t, 'loss': float(mean), 'standard_error': float(standard_error)})
    return rows
