"""Measures whether a sequence's log-probabilities depend on how it is presented to the model.

Regrouping micro-batches and sharing prompts are exact only if a sequence's log-probabilities depend
neither on the other sequences of its batch nor on its place in a row. This cannot be read off every
model's config, so it is measured: random sequences are scored in several layouts, and the results
may differ by rounding only. The size of rounding is measured on the same sequences, because in bf16
it is as large for some models as the effect of a wrong mask for others.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .layout import Layout
from .logps import completion_token_logps
from .model_head import vocabulary
from .model_input import Batch, ModelInput, padded_rows

LONGEST = 1024
"""Tokens of the longest row of a probe, unless the config contains a larger length at which the
model's behaviour changes."""

CHANGES = re.compile("top_?k|window|chunk|block|original_max")
"""Config keys that may contain such a length."""

FEW = 0.02
"""Share of tokens that may differ by more than rounding between batches: in a mixture of experts a
rounding error can change a token's routing."""

MARGIN = 2
"""Differences up to this multiple of the measured rounding count as rounding. Measured on
SmolLM2-135M in bf16: the layouts differ by 0.4 times the rounding, a mask that lets completions
attend to each other by 30 times, positions that run through the row by 6 to 10 times."""

LEAST = 2.5e-6
"""Lower bound of the rounding, nats per token: in float32 the perturbation may have no effect."""


Sizes = tuple[float, float, float, float]
MEDIAN, RMS, MAXIMUM, SUM = range(4)


@dataclass(frozen=True)
class Difference:
    """Difference of tokens' log-probabilities between two layouts, in nats, and that by rounding.

    Attributes:
        found: median, root mean square and maximum over tokens, and the largest sum over a
            sequence divided by the square root of its length. Errors of one sign add up in the
            sum, rounding errors do not.
        rounding: the same statistics of the rounding.
        outliers: share of tokens that differ by more than 2 ``MARGIN`` times the largest rounding.
    """

    found: Sizes
    rounding: Sizes
    outliers: float

    @classmethod
    def of(cls, found: Tensor, rounding: Tensor, sequence: Tensor) -> "Difference":
        """Of tokens of these sequences, each [tokens]."""
        median, rms, maximum, total = _sizes(rounding, sequence)
        outliers = found.abs() > 2 * MARGIN * max(maximum, LEAST)
        share = outliers.double().mean().item()
        return cls(_sizes(found, sequence), (median, rms, maximum, max(total, rms)), share)

    def is_rounding(self, margin: float, *sizes: int) -> bool:
        """Whether these statistics are within ``margin`` times the rounding's. False for NaN."""
        return all(self.found[i] <= margin * max(self.rounding[i], LEAST) for i in sizes)


def _sizes(difference: Tensor, sequence: Tensor) -> Sizes:
    size = difference.abs()
    sums = [part.sum() / len(part) ** 0.5 for part in _parts(difference, sequence)]
    return (
        size.median().item(),
        size.square().mean().sqrt().item(),
        size.max().item(),
        torch.stack(sums).abs().max().item(),
    )


def _parts(values: Tensor, sequence: Tensor) -> list[Tensor]:
    return [values[sequence == number] for number in sequence.unique()]


@dataclass(frozen=True)
class Trial:
    """The result of trying a layout: the difference of its one row from separate rows, or the
    exception that the row raised."""

    difference: Difference | None
    error: Exception | None = None

    def why_not(self) -> str | None:
        if self.difference is None:
            return f"the probe raised {type(self.error).__name__}: {self.error}"
        # The maximum: a convolution goes wrong at the first few tokens of a completion only.
        if self.difference.is_rounding(MARGIN, RMS, MAXIMUM, SUM):
            return None
        return (
            "the model gives tokens other log-probabilities then, by "
            f"{self.difference.found[RMS]:.1g} nats, where rounding makes "
            f"{self.difference.rounding[RMS]:.1g}"
        )


@dataclass(frozen=True)
class Found:
    """What a probe found.

    Attributes:
        company: short rows alone and beside the longest one.
        random: two passes over one batch differ by more than rounding.
        trials: of the layouts up to the first that may be used.
    """

    company: Difference
    random: bool
    trials: list[Trial]

    @property
    def depends_on_company(self) -> bool:
        # NaN says nothing about company; the step itself refuses it.
        if math.isnan(self.company.found[MEDIAN]):
            return False
        # Twice the margin: accepting wrongly costs exactness, refusing wrongly the whole run. The
        # noise of a random network, which is refused elsewhere, counts as rounding.
        is_rounding = self.company.is_rounding(2 * MARGIN, MEDIAN)
        return not is_rounding or self.company.outliers > FEW

    def why_not(self) -> list[str | None]:
        """Why each layout that was tried must not be used; None for the last one if it may."""
        if self.random:
            return ["the model's forward pass is random" for _ in self.trials]
        return [trial.why_not() for trial in self.trials]


@torch.no_grad()
def probe(
    model: nn.Module,
    unwrapped: PreTrainedModel,
    longest: int | None,
    device: torch.device,
    layouts: Sequence[Layout],
) -> Found:
    """Scores a probe.

    Args:
        model: the model as wrapped for training.
        unwrapped: the same model without wrappers, for its config, LM head and embeddings.
        longest: tokens of the longest row in training; None if there is no limit.
        device: where to score.
        layouts: what to try beside padded rows, in this order, until one may be used.
    """
    config = unwrapped.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or LONGEST
    length = min(longest or LONGEST, positions, probed_length(config, longest))
    head: Any = unwrapped.get_output_embeddings()
    some = padded_rows({n: v.to(device) for n, v in batch_of([([0] * 4, [1] * 4)]).items()})
    rows = probe_rows(min(config.vocab_size, vocabulary(model, head, some)), length)
    epsilon = rounding_error(unwrapped, device)

    def score(rows: ModelInput, seed: int = 0) -> Tensor:
        """log p of the completion tokens, [tokens], in the order of sequences. Passes of one shape
        and seed draw the same random numbers."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            logps, sequence = completion_token_logps(model, head, rows)
        return logps.double()[torch.argsort(sequence, stable=True)]

    def separate(rows: Sequence[Row]) -> ModelInput:
        return padded_rows({name: v.to(device) for name, v in batch_of(rows).items()})

    apart = separate(rows[:-1])
    expected = score(apart)
    embeddings: Any = unwrapped.get_input_embeddings()
    with nudged(embeddings, epsilon):
        rounding = score(apart) - expected
    alone = [score(separate([row])) for row in rows[:-1]]
    company = torch.cat(
        [
            score(separate([row, rows[-1]]))[: len(own)] - own
            for row, own in zip(rows[:-1], alone, strict=True)
        ]
    )
    noise = score(apart, seed=1) - expected
    of_tokens = torch.arange(len(alone)).repeat_interleave(torch.tensor(list(map(len, alone))))
    random = not Difference.of(noise.cpu(), rounding.cpu(), of_tokens).is_rounding(MARGIN, MAXIMUM)
    trials: list[Trial] = []
    for layout in layouts:
        batch = {name: v.to(device) for name, v in batch_of(rows[:-1]).items()}
        try:
            in_one_row = score(layout.one_row(batch))
        except Exception as raised:  # whatever it is, the model can't be used like this
            trials.append(Trial(None, raised))
            continue
        # The first sequence of the row stands where it would stand on its own.
        later = of_tokens > 0
        moved = (in_one_row - expected).cpu()[later]
        trials.append(Trial(Difference.of(moved, rounding.cpu()[later], of_tokens[later])))
        if trials[-1].why_not() is None:
            break
    rounding = torch.maximum(rounding.abs(), noise.abs())
    return Found(
        company=Difference.of(company.cpu(), rounding.cpu(), of_tokens),
        random=random,
        trials=trials,
    )


def probed_length(config: Any, longest: int | None) -> int:
    """Tokens of the longest probe row that covers the lengths in the config."""
    found = [
        value
        for key, value in config.to_dict().items()
        if CHANGES.search(key) and isinstance(value, int) and LONGEST <= value < (longest or 0)
    ]
    return longest if found and longest is not None else LONGEST


Row = tuple[list[int], list[int]]
"""Tokens of prompt and completion."""


def probe_rows(vocabulary: int, length: int) -> list[Row]:
    """Three completions of one prompt, two of another, and one row of ``length`` tokens (>= 16).

    With their prompts shared, the five take 11/8 of that length in one row. The second completion
    repeats the first one after a token of its own: a model that looks across would copy it.
    """
    quarter, eighth = max(length // 4, 4), max(length // 8, 2)
    tokens = torch.randint(
        vocabulary, (4 * length + 64,), generator=torch.Generator().manual_seed(0)
    )
    drawn = iter(tokens.tolist())

    def take(n: int) -> list[int]:
        return [next(drawn) for _ in range(n)]

    prompt, other, first = take(quarter), take(eighth), take(quarter)
    return [
        (prompt, first),
        (prompt, [*take(1), *first[: quarter - 2]]),
        (prompt, take(eighth)),
        (other, take(eighth)),
        (other, take(quarter)),
        (take(max(length - eighth, 8)), take(eighth)),
    ]


def batch_of(rows: Sequence[Row]) -> Batch:
    """Right-padded rows as the host's collators make them."""
    ids = [torch.tensor(prompt + completion) for prompt, completion in rows]
    completion = [torch.tensor([0] * len(row[0]) + [1] * len(row[1])) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "completion_mask": pad_sequence(completion, batch_first=True),
    }


@contextmanager
def nudged(embeddings: nn.Module, epsilon: float) -> Iterator[None]:
    """Perturbs each output of the embeddings by plus or minus one rounding error."""

    def nudge(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # From a generator of its own: what else is drawn in the pass stays the same.
        drawn = torch.randint(2, output.shape, generator=torch.Generator().manual_seed(0))
        sign = drawn.to(output.device) * 2 - 1
        return (output.float() * (1 + epsilon * sign)).to(output.dtype)

    with embeddings.register_forward_hook(nudge):
        yield


def coarsest_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The coarsest floating-point dtype of a model's weights, the compute dtypes of its quantized
    layers, and autocast."""
    dtypes: set[Any] = {parameter.dtype for parameter in model.parameters()}
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    ordered = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    return next((dtype for dtype in ordered if dtype in dtypes), torch.float32)


def rounding_error(model: nn.Module, device: torch.device) -> float:
    epsilon = torch.finfo(coarsest_dtype(model, device)).eps
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return max(epsilon, 2.0**-10)  # of tf32
    return epsilon
