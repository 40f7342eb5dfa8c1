"""Layer maths in float64 numpy, written from the papers' equations with explicit loops."""

import numpy as np


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rope(x_BTNH, positions_BT, inv_freq):
    """Each pair (i, i + H/2) as a complex number, turned by position · inv_freq[i]."""
    half = x_BTNH.shape[-1] // 2
    pairs = x_BTNH[..., :half] + 1j * x_BTNH[..., half:]
    turned = pairs * np.exp(1j * positions_BT[:, :, None, None] * inv_freq.astype(np.float64))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(q_BTNH, k_BSKH, v_BSKH, seen_BTS):
    """softmax(q·k / sqrt(H))·v query by query; zeros for a query that sees no key."""
    B, T, N, H = q_BTNH.shape
    group = N // k_BSKH.shape[2]
    out = np.zeros_like(q_BTNH)
    for b in range(B):
        for t in range(T):
            keys = np.flatnonzero(seen_BTS[b, t])
            for n in range(N):
                if len(keys):
                    scores = k_BSKH[b, keys, n // group] @ q_BTNH[b, t, n] / np.sqrt(H)
                    weights = np.exp(scores - scores.max())
                    out[b, t, n] = weights @ v_BSKH[b, keys, n // group] / weights.sum()
    return out
