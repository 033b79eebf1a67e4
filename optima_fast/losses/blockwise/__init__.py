"""The losses block by block, on any device: a block's loss and gradients while it is in cache.

A block is some batch items and some query rows (tokens, for the hidden states) with all heads.
Each function takes one layer, unchecked, and returns the loss with the gradients it was asked for,
of the loss itself (an upstream gradient of 1). Nothing of size B * H * Nq * Nk is ever made.

Least traffic, forward and backward: the inputs once and the gradients once; the maps stay in cache.
Every sum has a fixed order, so results are bit-reproducible.
"""

from optima_fast.losses.blockwise.attention import attention_loss
from optima_fast.losses.blockwise.blocks import Gradients, empty_gradient
from optima_fast.losses.blockwise.hidden import hidden_loss
from optima_fast.losses.blockwise.indexer import indexer_kl

__all__ = ["Gradients", "attention_loss", "empty_gradient", "hidden_loss", "indexer_kl"]
