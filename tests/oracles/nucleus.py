"""The distribution a sampler should draw from, in float64 numpy, by sorting."""

import numpy as np


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """[V] logits -> [V] float64: temperature, top-k, top-p, min-p, each on what the last one left."""
    scaled = np.asarray(logits, np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")  # ties: the lower id first
    keep = np.ones(len(p), bool)
    if top_k:
        keep[order[top_k:]] = False
        p = np.where(keep, p, 0) / p[keep].sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= top_p]] = False
        p = np.where(keep, p, 0) / p[keep].sum()
    keep &= p >= min_p * p.max()
    p = np.where(keep, p, 0)
    return p / p.sum()
