"""What a layout of sequences costs a model, in work and in memory, before it is computed.

A forward pass of ``rows`` rows of ``width`` tokens multiplies each token with the weights of each
layer (linear in the tokens), and each query with each key (quadratic in the width). A custom
mask costs twice: attention loses the causal kernel, which leaves out half of the pairs, and
the mask itself is held.
"""

from dataclasses import dataclass
from typing import Any

CAUSAL, MASKED = 0.75, 1.5
"""Time of attention without and with a mask, relative to as many multiplications in a linear layer,
all pairs of query and key counted. Measured on one CPU core at 500 to 3,000 tokens (forward
and backward pass, 9 heads of 64): 1.1 to 1.7 times the causal kernel's time with a mask, and 1.4
times the time per multiplication of a linear layer."""

DENSE_FACTOR = 4
"""Ratio of the feed-forward width to the model's, where the config does not say."""


@dataclass(frozen=True)
class Cost:
    """Sizes of a model, as far as the choice of a layout depends on them.

    Attributes:
        pair: work of one pair of query and key, in units of one token's work in linear layers.
        token: bytes held for one token until the backward pass.
        mask: bytes held for one entry of a mask.
        eager: whether every pair of a row is computed and held, masked or not.
    """

    pair: float
    token: float
    mask: float
    eager: bool = False

    @classmethod
    def of(cls, config: Any, itemsize: int, checkpointing: bool, eager: bool = False) -> "Cost":
        """The sizes in a text config, for numbers of ``itemsize`` bytes."""
        width = config.hidden_size
        layers = config.num_hidden_layers
        heads = _largest(config, "num_attention_heads", 1)
        size = _largest(config, "head_dim", width // heads)
        queries = heads * size
        keys = _largest(config, "num_key_value_heads", heads) * size
        inner = _largest(config, "intermediate_size", DENSE_FACTOR * width)
        active = _largest(config, "num_experts_per_tok", 1)
        if active > 1:
            inner = _largest(config, "moe_intermediate_size", inner)
        weights = 2 * width * (queries + keys) + 3 * width * inner * active
        layer = 6 * width + 2 * (queries + keys) + 3 * inner * active
        # Without checkpointing every layer keeps what it computed, and a copy of the mask as
        # numbers that are added to its scores.
        whole = 1 if checkpointing else layers
        # Eager attention keeps the weights of every head, in float32 and in the model's numbers.
        mask = itemsize + heads * (4 + itemsize) * whole if eager else 1 + itemsize * whole
        return cls(
            pair=2 * queries / weights,
            token=itemsize * (layer * whole + (width * layers if checkpointing else 0)),
            mask=mask,
            eager=eager,
        )

    def work(self, rows: int, width: int, masked: bool) -> float:
        """The work of a forward pass, in units of one token's work in linear layers."""
        pairs = MASKED if masked or self.eager else CAUSAL
        return rows * width * (1 + pairs * self.pair * width)

    def memory(self, rows: int, width: int, masked: bool) -> float:
        """Bytes held until the backward pass."""
        return rows * width * (self.token + (self.mask * width if masked or self.eager else 0))


def _largest(config: Any, name: str, default: int) -> int:
    """A size of the config, the largest where it differs from layer to layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # some configs raise an error of their own where layers differ
        return default
    if isinstance(value, list | tuple):
        value = max(value, default=None)
    return int(value or default)
