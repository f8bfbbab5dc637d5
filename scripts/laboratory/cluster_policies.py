"""Policies that group tokens by k-means instead of position, on their own exact grouping. Re-implemented from papers.

SVG2 (arXiv 2505.18875) clusters the queries and the keys of every head, estimates the mass of each pair of clusters
from centroids and sizes, and computes the clusters that make up a cumulative share exactly; SVG-EAR (arXiv 2603.08982)
puts one centroid in the place of what is left out, and ranks pairs by estimated error for their cost.
"""

from __future__ import annotations

import torch
from block_policies import Policy, Result
from cases import Case
from equal_compute import factor_at
from torch import Tensor

ITERATIONS = 10
COHERENCE = 0.1  # as psa_diffusers.planning.errors has it


def kmeans(tokens: Tensor, clusters: int, *, seed: int = 0, iterations: int = ITERATIONS) -> Tensor:
    """int64 [tokens]: the cluster of each row of tokens [tokens, head_dim]. Empty clusters may be left."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(tokens), generator=generator)[:clusters].to(tokens.device)
    centres = tokens[start]
    for _ in range(iterations):
        label = torch.cdist(tokens, centres).argmin(1)
        count, total = _sums(tokens, label, clusters)
        centres = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centres)
    return torch.cdist(tokens, centres).argmin(1)


def _sums(tokens: Tensor, label: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    one_hot = torch.nn.functional.one_hot(label, clusters).to(tokens.dtype)
    return one_hot.sum(0), one_hot.T @ tokens


def _means(tokens: Tensor, label: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Size [clusters] and mean [clusters, head_dim]."""
    count, total = _sums(tokens, label, clusters)
    return count, total / count.clamp(min=1)[:, None]


class Clusters:
    """One head, clustered: its tensors, labels, sizes and centroids."""

    def __init__(self, case: Case, head: int, query_clusters: int, key_clusters: int) -> None:
        self.query, self.key, self.value = (x[0, :, head].float() for x in case.inputs)
        self.query = self.query * case.scale
        self.q_label = kmeans(self.query / case.scale, query_clusters)
        self.k_label = kmeans(self.key, key_clusters)
        self.q_count, self.q_mean = _means(self.query, self.q_label, query_clusters)
        self.k_count, self.k_mean = _means(self.key, self.k_label, key_clusters)
        _, self.v_mean = _means(self.value, self.k_label, key_clusters)

    @property
    def mass(self) -> Tensor:
        """[query clusters, key clusters]: the share of attention, by centroids."""
        return torch.softmax(self.q_mean @ self.k_mean.T + self.k_count.log(), -1)

    @property
    def cost(self) -> Tensor:
        """The share of the head's token pairs that each pair of clusters has."""
        return self.q_count[:, None] * self.k_count[None, :] / (len(self.query) * len(self.key))

    def errors(self) -> Tensor:
        """Squared error of reading a pair by its centroid, summed over queries; as the budget rule estimates it."""
        gap = self.key - self.k_mean[self.k_label]
        _, key_spread = _means(gap.square(), self.k_label, len(self.k_count))
        _, value_spread = _means((self.value - self.v_mean[self.k_label]).square(), self.k_label, len(self.k_count))
        _, power = _means(self.query.square(), self.q_label, len(self.q_count))
        variance, mass = power @ key_spread.T, self.mass
        output = mass @ self.v_mean
        distance = torch.cdist(output, self.v_mean).square()
        lost = torch.expm1(-0.5 * variance).square() * distance + COHERENCE * variance * value_spread.sum(-1)
        return mass.square() * lost * self.q_count[:, None] / output.square().sum(-1).mean()

    def attend(self, kept: Tensor, centroids: bool) -> Tensor:
        """Exact attention [tokens, head_dim] over the pairs of clusters in kept, bool; the rest by centroid or not."""
        read = kept[self.q_label]
        logits = (self.query @ self.key.T).masked_fill_(~read[:, self.k_label], -1e30)
        values = self.value
        if centroids:
            coarse = self.query @ self.k_mean.T + self.k_count.log()
            logits = torch.cat([logits, coarse.masked_fill(read, -1e30)], 1)
            values = torch.cat([values, self.v_mean])
        return torch.softmax(logits, -1) @ values


class _Clustered:
    """The clusters of the newest case: several budgets share them."""

    def __init__(self, query_clusters: int, key_clusters: int) -> None:
        self.sizes, self.case, self.found = (query_clusters, key_clusters), None, []

    def of(self, case: Case) -> list[Clusters]:
        if self.case is not case:
            self.case, self.found = case, [Clusters(case, head, *self.sizes) for head in range(case.heads)]
        return self.found

    def estimator(self, case: Case, iterations: int = ITERATIONS) -> float:
        """k-means as a share of dense attention: 2 FLOPs a feature, token and centre, of 4 a feature and pair."""
        return (iterations + 1) * sum(self.sizes) / (2 * case.tokens) + self.sizes[0] * self.sizes[1] / (
            2 * case.tokens**2
        )


def svg2(query_clusters: int, key_clusters: int) -> Policy:
    """SVG2's selection; the cumulative share is what meets the budget, one over all heads."""
    clustered = _Clustered(query_clusters, key_clusters)

    def policy(case: Case, budget: float) -> Result:
        heads = clustered.of(case)
        mass, cost = (torch.stack([getattr(head, name) for head in heads]) for name in ("mass", "cost"))

        def kept_at(share: float) -> Tensor:
            ranked, index = mass.sort(dim=-1, descending=True, stable=True)
            return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, index, ranked.cumsum(-1) - ranked < share)

        kept = factor_at(budget, 1.0, kept_at, lambda kept: float((kept * cost).sum()) / len(heads))
        output = torch.stack([head.attend(k, centroids=False) for head, k in zip(heads, kept, strict=True)], 1)
        return Result(output[None], float((kept * cost).sum()) / len(heads), clustered.estimator(case))

    return policy


def svg_ear(query_clusters: int, key_clusters: int) -> Policy:
    """SVG-EAR's selection: pairs in the order of error for cost, over all heads; the rest by centroid."""
    clustered = _Clustered(query_clusters, key_clusters)

    def policy(case: Case, budget: float) -> Result:
        heads = clustered.of(case)
        errors, cost = torch.stack([head.errors() for head in heads]), torch.stack([head.cost for head in heads])
        centroid = cost / torch.stack([head.k_count for head in heads])[:, None, :].clamp(min=1)
        centroid = centroid.nan_to_num(0.0)
        room = budget * len(heads) - float(centroid.sum())
        gain = (errors / (cost - centroid)).nan_to_num(0.0, posinf=0.0)
        order = gain.flatten().argsort(dim=0, descending=True, stable=True)
        spent = (cost - centroid).flatten()[order].cumsum(0)
        kept = torch.zeros(cost.numel(), dtype=torch.bool, device=cost.device)
        kept[order[spent <= room]] = True
        kept = kept.view_as(cost)
        output = torch.stack([head.attend(k, centroids=True) for head, k in zip(heads, kept, strict=True)], 1)
        achieved = float(torch.where(kept, cost, centroid).sum()) / len(heads)
        return Result(output[None], achieved, clustered.estimator(case))

    return policy
