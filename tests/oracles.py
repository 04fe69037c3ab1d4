"""An independent implementation of the harmonized losses, in float64 NumPy."""

import numpy as np


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -np.float64(logits)))


def binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    x, t = np.float64(logits), np.float64(targets)
    return t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x)


def near_edge(norm: np.ndarray, bins: int) -> np.ndarray:
    """Where float32 and float64 may disagree on the bin."""
    scaled = np.float64(norm) * bins
    return np.abs(scaled - np.round(scaled)) < 1e-4 * bins


def draw_off_edges(draw, norm_of, bins: int) -> np.ndarray:
    """f32[...] from `draw()`, redrawn where `norm_of` it is within 1e-4 of a bin's edge."""
    values = np.float32(draw())
    while (near := near_edge(norm_of(values), bins)).any():
        values = np.where(near, np.float32(draw()), values)
    return values


def histogram(norm: np.ndarray, mask: np.ndarray, bins: int) -> np.ndarray:
    return np.histogram(np.float64(norm)[mask], bins, range=(0, 1))[0].astype(np.float64)


def bin_of(norm: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.searchsorted(np.arange(bins + 1) / bins, norm, "right") - 1, 0, bins - 1)


def weights_after(
    norms: list[np.ndarray],
    masks: list[np.ndarray],
    *,
    bins: int,
    momentum: float,
    min_count: float = 10.0,
    strength: float = 1.0,
    normalizer: str = "nonempty",
) -> np.ndarray:
    """Weights of the last batch after all of them: the averaged histogram in closed form."""
    seen = np.stack([histogram(n, m, bins) for n, m in zip(norms, masks, strict=True)])
    share = momentum ** np.arange(len(seen))[::-1]
    average = share @ seen / share.sum()  # sums to one: nothing is left to correct
    density = np.where(average > 0, np.maximum(average, min_count), 1)  # 1: of no example
    if normalizer == "bins":
        table = (seen[-1].sum() / (bins * density)) ** strength
    else:
        table = density**-strength / np.average(density**-strength, weights=average)
        if not strength or (average < min_count).all():
            np.testing.assert_allclose(table[average > 0], 1)
    return np.where(masks[-1], table[bin_of(norms[-1], bins)], 0)


def published_weights(
    norms: list[np.ndarray], masks: list[np.ndarray], *, bins: int, momentum: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the last batch and the moving counts, bin by bin as in the published code."""
    moving = np.zeros(bins)
    for norm, mask in zip(norms, masks, strict=True):
        weights, filled = np.zeros(norm.shape), 0
        for j in range(bins):
            inside = mask & (norm >= j / bins) & ((norm < (j + 1) / bins) | (j == bins - 1))
            if inside.any():
                moving[j] = momentum * moving[j] + (1 - momentum) * inside.sum()
                weights[inside] = mask.sum() / moving[j]
                filled += 1
        weights /= max(filled, 1)
    return weights, moving


def exact_density(norm: np.ndarray, mask: np.ndarray, epsilon: float) -> np.ndarray:
    """Equations 4-6 as they stand, O(N^2): examples of each window over its valid length."""
    half = np.float32(epsilon / 2)  # windows end where float32 says, so that no example is in doubt
    flat, used = np.float32(norm).ravel(), mask.ravel()
    upper, lower = flat + half, flat - half
    inside = (flat[None, :] >= lower[:, None]) & (flat[None, :] < upper[:, None]) & used[None, :]
    length = np.minimum(np.float64(upper), 1) - np.maximum(np.float64(lower), 0)
    return np.where(used, inside.sum(axis=1) / length, 0).reshape(norm.shape)
