"""From rows to token ids, in both modes, within the host's own loading.

The host has no strategy for (prompt, completion, label) with the chat template, its strategies of
pairs with one make other tokens than the template does, and its schema drops the options of a
``datasets:`` entry that it does not know. So an entry whose ``type`` is one of ours, or one of the
host's chat-template types of pairs, is rewritten before the host validates it
(``resolve_datasets``): its options move to ``aot_datasets``, and its type becomes a name that the
host resolves to a function of this package (``strategy_factory``).

    options.py     what an entry of ours may say
    entries.py     all entries checked, and rewritten for the host
    host_schema.py the host's schemas of an entry, widened
    mixing.py      which rows of an entry are read: `weight` and `shards`
    labels.py      a cell of the label column -> positive, negative or dropped
    rows.py        a row -> examples (prompt turns, completion turn, label); all that knows schemas
    threads.py     trees of messages -> rows, for one of the strategies
    render.py      an example -> the two strings that the model is trained on
    rendering.py   which chat template a run used, kept for the report
    sampler.py     an order of labelled rows with both labels in every step
    strategy.py    the above as the batched map that the host calls
    accounting.py  what became of every row
    freshness.py   prepared rows are read only while their sources are unchanged
    loading.py     the host's loading, with checks and a table around it (heavy to import)
    tokens.py      those strings -> token ids, in place of TRL's tokenization
    host_types.py  what the host's types that render text by themselves can't represent
"""

from .accounting import check_labels
from .entries import resolve_datasets, resolve_unpaired_datasets
from .strategy import strategy_factory
from .tokens import is_text, prepare_tokens

__all__ = [
    "check_labels",
    "is_text",
    "prepare_tokens",
    "resolve_datasets",
    "resolve_unpaired_datasets",
    "strategy_factory",
]
