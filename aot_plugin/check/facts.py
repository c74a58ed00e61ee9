"""What is known of a training before it starts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..data.accounting import RowCounts


@dataclass(frozen=True)
class Part:
    """A piece of a shown row.

    Attributes:
        name: "prompt", "chosen", "rejected", "positive", "negative" or a level.
        text: the piece as the model sees it, special tokens included.
        ids: its token ids in training; None if TRL tokenizes them later.
        trained: whether the loss is a function of its log-probability.
    """

    name: str
    text: str
    ids: Sequence[int] | None
    trained: bool


@dataclass(frozen=True)
class Shown:
    """A kept row: its entry, and its pieces in order; of a pair, prompt, chosen and rejected."""

    where: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Lengths:
    """Tokens of sequences, prompt and response together.

    Attributes:
        tokens: of each sequence, before any is dropped or cut; a pair has two.
        limit: ``sequence_len``.
        longer: rows of which a sequence is longer than ``limit``.
        strategy: ``excess_length_strategy``.
    """

    tokens: Sequence[int]
    limit: int
    longer: int
    strategy: str

    @property
    def median(self) -> int:
        return round(median(self.tokens))

    @property
    def most(self) -> int:
        """The length that 95 per cent of the sequences do not exceed."""
        return sorted(self.tokens)[-(-len(self.tokens) * 95 // 100) - 1]

    @property
    def longest(self) -> int:
        return max(self.tokens)


@dataclass(frozen=True)
class Entry:
    """The first rows of an entry.

    Attributes:
        where: ``datasets[0]``.
        kind: the type as the user wrote it.
        counts: rows looked at, kept and dropped.
        more: whether there are more rows.
        mixing: keys by which the entry chooses among its rows.
        levels: kept rows by level, from 0 to 1; empty if they are not graded.
        weights: the least, the mean and the largest weight; None without ``field_weight``.
        lengths: None if there are no rows, or they are not ``tokenized``.
        prompts: kept rows by prompt (hash of the token ids).
        shared_tokens, all_tokens: of the sequences of kept rows: tokens of prompts that a row has a
            second time (a pair has its prompt twice), and tokens in all.
        images: whether the rows have images.
        tokenized: False for rows that TRL tokenizes in the training: turns, with or without images.
    """

    where: str
    kind: str
    counts: RowCounts
    more: bool
    mixing: Mapping[str, object]
    levels: Mapping[float, int]
    weights: tuple[float, float, float] | None
    lengths: Lengths | None
    prompts: Counter[int]
    shared_tokens: int
    all_tokens: int
    images: bool
    tokenized: bool

    @property
    def is_train(self) -> bool:
        return self.counts.split == "train"


@dataclass(frozen=True)
class Step:
    """What an optimizer step consists of.

    Attributes:
        micro_batch, accumulation, ranks: its factors.
        whole: whether all of it is sorted together, not each micro-batch.
        paired: whether its rows are pairs.
        labels: expected rows of each label or level among those that are sorted together.
        balanced: whether labels are drawn in equal numbers.
        variance: of a step's gradient with labels in the proportion of the data, over that with
            equal numbers.
    """

    micro_batch: int
    accumulation: int
    ranks: int
    whole: bool
    paired: bool
    labels: Mapping[str, float]
    balanced: bool = False
    variance: float = 1.0

    @property
    def rows(self) -> int:
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def together(self) -> int:
        """Rows that are sorted together."""
        return self.rows if self.whole else self.micro_batch


@dataclass(frozen=True)
class Memory:
    """What a micro-batch takes, as far as the model's config says it.

    Attributes:
        model: ``model_type``.
        vocabulary, layers, width: sizes.
        itemsize: bytes of a number in a forward pass.
        checkpointing: whether layers keep their inputs only.
        sequences: sequences of a micro-batch.
        longest: tokens of the longest kept sequence that was looked at.
        limit: ``sequence_len``.
        per_token: bytes that wait for the backward pass, for each token; an estimate without
            checkpointing. None if not known.
    """

    model: str
    vocabulary: int
    layers: int
    width: int
    itemsize: int
    checkpointing: bool
    sequences: int
    longest: int
    limit: int
    per_token: float | None

    def tokens(self, length: int) -> int:
        """Tokens of a micro-batch of sequences of this length."""
        return self.sequences * length

    def logits(self, length: int) -> int:
        """Bytes of all logits of such a micro-batch in float32."""
        return 4 * self.vocabulary * self.tokens(length)

    def chunk(self, length: int) -> int:
        """Bytes of those that the chunked LM head holds at a time."""
        from ..scoring.lm_head import chunk_tokens

        return 4 * self.vocabulary * min(chunk_tokens(self.vocabulary), self.tokens(length))


@dataclass(frozen=True)
class Logged:
    """What a run records.

    Attributes:
        train, evaluation: metric keys; the latter empty without evaluations.
        files: in the output directory.
        loggers: as in ``report_to``.
    """

    train: Sequence[str]
    evaluation: Sequence[str]
    files: Sequence[str]
    loggers: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """All of the above.

    Attributes:
        config: the file.
        settings: keys of the loss and their values.
        asked: rows of each entry that were to be looked at.
        held_out: `val_set_size`, the number or share of rows that the host holds out at random.
        no_memory: why nothing is known of the model; None if it is.
        failure: why a training would fail for its rows; None if nothing says so.
    """

    config: str
    settings: Mapping[str, object]
    asked: int
    held_out: float
    entries: Sequence[Entry]
    shown: Sequence[Shown]
    step: Step
    memory: Memory | None
    no_memory: str | None
    adapter: str | None
    precomputed: bool
    logged: Logged
    failure: str | None
