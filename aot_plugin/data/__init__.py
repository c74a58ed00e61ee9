"""From rows to token ids, in both modes, inside the host's own data loading.

The host has no strategy that renders (prompt, completion, label) rows with the chat template. Its
chat-template strategies for pairs produce other tokens than the template does. And its schema drops
options of a ``datasets:`` entry that it does not know. So an entry whose ``type`` is one of ours,
or one of the host's chat-template types for pairs, is rewritten before the host validates it
(``resolve_datasets``): its options are stored in ``aot_datasets``, and its type becomes a name that
the host resolves to a function of this package (``strategy_factory``).

    options.py     options of an entry with one of our types
    entries.py     checks all entries and rewrites them for the host
    host_schema.py the host's schemas of an entry, extended
    mixing.py      which rows of an entry are read: `weight` and `shards`
    weights.py     the weight of a row: the mass of its atoms
    levels.py      the levels of graded rows
    labels.py      a cell of the label column -> positive, negative or dropped
    images.py      rows with images, which TRL renders
    rows.py        a row -> examples (prompt turns, completion turn, label); the only module that
                   knows dataset schemas
    threads.py     message trees -> rows, for the strategy `chat_template.threads`
    render.py      an example -> the two strings that the model is trained on
    tokens.py      those strings -> token ids, in place of TRL's tokenization
    strategy.py    the above as the batched map that the host calls
    sampler.py     an order of labelled rows with all labels in what is sorted together
    rendering.py   stores the chat template that a run used, for the report
    accounting.py  counts of kept and dropped rows
    host_types.py  what the host's types without a chat template can't represent
    blame.py       names the row on which one of the host's types fails
    freshness.py   reuses prepared rows only while their sources are unchanged
    loading.py     the host's loading, with checks and a log table around it (heavy to import)
    first_rows.py  the first rows of an entry, for the command `check`
"""

from .accounting import check_labels
from .entries import kept_entries, resolve_datasets, resolve_unpaired_datasets
from .levels import LEVEL, level_of, levels
from .strategy import strategy_factory
from .tokens import is_text, prepare_tokens, rows_cut
from .weights import WEIGHT

__all__ = [
    "LEVEL",
    "WEIGHT",
    "check_labels",
    "is_text",
    "kept_entries",
    "level_of",
    "levels",
    "prepare_tokens",
    "resolve_datasets",
    "resolve_unpaired_datasets",
    "rows_cut",
    "strategy_factory",
]
