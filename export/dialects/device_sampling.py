"""The next token chosen inside the graph, with the meaning of `engine/generation/sampler.py`:
temperature, top-k, top-p, a draw.

Everything is float32 and free of the order in which an operator happens to return equal values: a token is compared
with each of the TOP_K_LIMIT likeliest ones, which takes neither a sort nor a running sum. There is no matrix product
in it either, which a GPU might round to TF32.
"""

import torch
from torch import Tensor

from starling.engine.generation.sampler import SMALLEST_TEMPERATURE
from starling.engine.names import TOP_K_LIMIT


def choose_tokens(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """The next token of each row, int64 [batch, 1], from logits [batch, vocab] of any float type.

    `temperature`, `top_p`, `uniform` (in [0, 1)): float32 [batch]; `top_k`: int64 [batch]. top_k 1 takes the likeliest
    token, the first of equals. top_k 0 is off: top_p is then a share of the whole vocabulary's probability. In every
    case the TOP_K_LIMIT likeliest tokens are all that can be drawn. Tokens as likely as the last that top_k or top_p
    keeps are kept too. -1 where the greatest logit is infinite or no number.
    """
    scores = logits.float()
    vocab = scores.shape[-1]
    peak = scores.amax(dim=-1, keepdim=True)
    likeliest = torch.where(scores == peak, torch.arange(vocab), vocab - 1).amin(dim=-1, keepdim=True)
    values, tokens = scores.topk(min(TOP_K_LIMIT, vocab))
    scale = temperature[:, None].clamp(min=SMALLEST_TEMPERATURE).reciprocal()
    weights = ((values - peak) * scale).exp()
    vocabulary_weight = ((scores - peak) * scale).exp().sum(dim=-1, keepdim=True)
    limit = top_k[:, None]
    off = limit == 0
    weights = torch.where(off | (_greater(values).float().sum(dim=-1) < limit), weights, 0.0)
    share = top_p[:, None] * torch.where(off, vocabulary_weight, weights.sum(dim=-1, keepdim=True))
    weight_above = _sum_where(_greater(weights), weights)
    kept = torch.where((weight_above < share) | (top_p[:, None] >= 1), weights, 0.0)
    drawn = _draw(kept, tokens, uniform[:, None], vocab)
    chosen = torch.where((limit == 1) | (drawn == vocab), likeliest, drawn)
    return torch.where(peak.abs() <= torch.finfo(torch.float32).max, chosen, -1)


def _draw(weights: Tensor, tokens: Tensor, uniform: Tensor, none: int) -> Tensor:
    """The first token, in the vocabulary's order, at which the running sum of the weights passes `uniform` of it all.

    `weights`, `tokens`: [batch, candidates] in any order. `none` where rounding lets no sum pass.
    """
    running = _sum_where(tokens[:, None, :] <= tokens[:, :, None], weights)
    passed = running > uniform * weights.sum(dim=-1, keepdim=True)
    return torch.where(passed, tokens, none).amin(dim=-1, keepdim=True)


def _greater(values: Tensor) -> Tensor:
    """Boolean [batch, i, j]: whether value j is greater than value i."""
    return values[:, None, :] > values[:, :, None]


def _sum_where(mask: Tensor, weights: Tensor) -> Tensor:
    """For each i the sum of the weights j where mask [batch, i, j]."""
    return torch.where(mask, weights[:, None, :], 0.0).sum(dim=-1)
