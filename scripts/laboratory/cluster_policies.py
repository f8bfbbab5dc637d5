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
NEVER = -1e30  # added to a logit


def kmeans(tokens: Tensor, clusters: int, *, seed: int = 0, iterations: int = ITERATIONS) -> Tensor:
    """int64 [..., tokens]: the cluster of each row of tokens [..., tokens, head_dim]. Empty clusters may be left."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(tokens.shape[-2], generator=generator)[:clusters].to(tokens.device)
    centres = tokens[..., start, :]
    for _ in range(iterations):
        label = torch.cdist(tokens, centres).argmin(-1)
        count, total = _sums(tokens, label, clusters)
        centres = torch.where(count[..., None] > 0, total / count.clamp(min=1)[..., None], centres)
    return torch.cdist(tokens, centres).argmin(-1)


def _sums(tokens: Tensor, label: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    one_hot = torch.nn.functional.one_hot(label, clusters).to(tokens.dtype)
    return one_hot.sum(-2), one_hot.mT @ tokens


def _means(tokens: Tensor, label: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Size [..., clusters] and mean [..., clusters, head_dim]."""
    count, total = _sums(tokens, label, clusters)
    return count, total / count.clamp(min=1)[..., None]


def _of_tokens(values: Tensor, label: Tensor) -> Tensor:
    """values [..., clusters, x] of each token's cluster, [..., tokens, x]."""
    return values.gather(-2, label[..., None].expand(*label.shape, values.shape[-1]))


class Clusters:
    """A case's heads, each clustered by itself: float32 [batch, heads, tokens or clusters, head_dim], labels, sizes."""

    def __init__(self, case: Case, query_clusters: int, key_clusters: int) -> None:
        self.query, self.key, self.value = (x.transpose(1, 2).float() for x in case.inputs)
        self.q_label = kmeans(self.query, query_clusters)
        self.k_label = kmeans(self.key, key_clusters)
        self.query = self.query * case.scale
        self.q_count, self.q_mean = _means(self.query, self.q_label, query_clusters)
        self.k_count, self.k_mean = _means(self.key, self.k_label, key_clusters)
        _, self.v_mean = _means(self.value, self.k_label, key_clusters)

    @property
    def mass(self) -> Tensor:
        """[batch, heads, query clusters, key clusters]: the share of attention, by centroids."""
        return torch.softmax(self.q_mean @ self.k_mean.mT + self.k_count.log()[..., None, :], -1)

    @property
    def cost(self) -> Tensor:
        """The share of the head's token pairs that each pair of clusters has, as ``mass``."""
        pairs = self.query.shape[-2] * self.key.shape[-2]
        return self.q_count[..., :, None] * self.k_count[..., None, :] / pairs

    def errors(self) -> Tensor:
        """Squared error of reading a pair by its centroid, summed over queries; as the budget rule estimates it."""
        clusters = self.k_count.shape[-1]
        key_gap = self.key - _of_tokens(self.k_mean, self.k_label)
        value_gap = self.value - _of_tokens(self.v_mean, self.k_label)
        _, key_spread = _means(key_gap.square(), self.k_label, clusters)
        _, value_spread = _means(value_gap.square(), self.k_label, clusters)
        _, power = _means(self.query.square(), self.q_label, self.q_count.shape[-1])
        variance, mass = power @ key_spread.mT, self.mass
        output = mass @ self.v_mean
        distance = torch.cdist(output, self.v_mean).square()
        lost = torch.expm1(-0.5 * variance).square() * distance
        lost = lost + COHERENCE * variance * value_spread.sum(-1)[..., None, :]
        power = output.square().sum(-1).mean(-1)[..., None, None]
        return mass.square() * lost * self.q_count[..., :, None] / power

    def attend(self, kept: Tensor, centroids: bool) -> Tensor:
        """Exact attention [batch, tokens, heads, head_dim] over the pairs of clusters in kept, bool
        [batch, heads, query clusters, key clusters]; the rest by centroid or not."""
        samples = [self._attend_sample(sample, kept[sample], centroids) for sample in range(len(kept))]
        return torch.stack(samples).transpose(1, 2)

    def _attend_sample(self, sample: int, kept: Tensor, centroids: bool) -> Tensor:
        read = _of_tokens(kept, self.q_label[sample])  # [heads, tokens, key clusters]
        by_token = self.k_label[sample][:, None, :].expand(*read.shape[:2], -1)
        bias = torch.where(read, 0.0, NEVER).gather(-1, by_token)
        key, value = self.key[sample], self.value[sample]
        if centroids:
            of_centroids = torch.where(read, NEVER, self.k_count[sample].log()[:, None, :])
            bias = torch.cat([bias, of_centroids.clamp(min=NEVER)], -1)
            key, value = torch.cat([key, self.k_mean[sample]], -2), torch.cat([value, self.v_mean[sample]], -2)
        tensors = (x[None] for x in (self.query[sample], key, value))
        return torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=bias[None], scale=1.0)[0]


class _Clustered:
    """The clusters of the newest case: several budgets share them."""

    def __init__(self, query_clusters: int, key_clusters: int) -> None:
        self.sizes, self.case, self.found = (query_clusters, key_clusters), None, None

    def of(self, case: Case) -> Clusters:
        if self.case is not case:
            self.case, self.found = case, Clusters(case, *self.sizes)
        return self.found

    def estimator(self, case: Case, iterations: int = ITERATIONS) -> float:
        """k-means as a share of dense attention: 2 FLOPs a feature, token and centre, of 4 a feature and pair."""
        return (iterations + 1) * sum(self.sizes) / (2 * case.tokens) + self.sizes[0] * self.sizes[1] / (
            2 * case.tokens**2
        )


def _cost_of(kept: Tensor, cost: Tensor) -> Tensor:
    """float64 [batch]: the share of all token pairs in the kept pairs of clusters, mean over heads."""
    return (kept * cost.double()).sum((2, 3)).mean(1)


def svg2(query_clusters: int, key_clusters: int) -> Policy:
    """SVG2's selection; the cumulative share is what meets the budget, one over all heads."""
    clustered = _Clustered(query_clusters, key_clusters)

    def policy(case: Case, budget: float) -> Result:
        clusters = clustered.of(case)
        mass, cost = clusters.mass, clusters.cost
        ranked, index = mass.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked

        def kept_at(share: Tensor) -> Tensor:
            return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, index, before < share.to(before))

        kept = factor_at(budget, 1.0, mass, kept_at, lambda kept: _cost_of(kept, cost))
        return Result(clusters.attend(kept, centroids=False), _cost_of(kept, cost), clustered.estimator(case))

    return policy


def svg_ear(query_clusters: int, key_clusters: int) -> Policy:
    """SVG-EAR's selection: pairs in the order of error for cost, over all heads; the rest by centroid."""
    clustered = _Clustered(query_clusters, key_clusters)

    def policy(case: Case, budget: float) -> Result:
        clusters = clustered.of(case)
        errors, cost = clusters.errors(), clusters.cost
        centroid = (cost / clusters.k_count[..., None, :].clamp(min=1)).nan_to_num(0.0)
        room = budget * case.heads - centroid.sum((1, 2, 3))
        gain = (errors / (cost - centroid)).nan_to_num(0.0, posinf=0.0)
        order = gain.flatten(1).argsort(dim=1, descending=True, stable=True)
        spent = (cost - centroid).flatten(1).gather(1, order).cumsum(1)
        kept = torch.zeros_like(spent, dtype=torch.bool).scatter_(1, order, spent <= room[:, None]).view_as(cost)
        costs = torch.where(kept, cost, centroid).double().sum((2, 3)).mean(1)
        return Result(clusters.attend(kept, centroids=True), costs, clustered.estimator(case))

    return policy
