"""Options of a ``datasets:`` entry with one of our types."""

from collections.abc import Callable, Collection, Iterator, Mapping
from math import isfinite
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .labels import are_rising

LOADER_KEYS = (
    *("path", "split", "name", "data_files", "ds_type", "revision", "trust_remote_code"),
    *("weight", "shards", "shards_idx"),
)
"""Keys of an entry that say where the rows are and which of them are read."""

Cell = Callable[[Mapping[str, Any], str], Any]


class ConversationOptions(BaseModel):
    """Options of every strategy: where the prompt is, and how it is rendered."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prefers_messages: ClassVar[bool] = False
    """If a row has both columns and the entry names neither, `field_messages` holds the prompt."""

    field_messages: str = "messages"
    field_prompt: str = "prompt"
    field_system: str = "system"
    field_tools: str = "tools"
    field_weight: str | None = Field(default=None, min_length=1)
    system_prompt: str | None = None
    message_property_mappings: dict[str, str] = Field(default_factory=dict)
    roles: dict[str, list[str]] = {
        "user": ["user", "human", "prompter"],
        "assistant": ["assistant", "gpt"],
        "system": ["system"],
        "tool": ["tool"],
    }
    chat_template: str | None = None
    chat_template_jinja: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "ConversationOptions":
        if {"field_messages", "field_prompt"} <= self.model_fields_set:
            raise ValueError("`field_messages` and `field_prompt` both name the prompt: keep one")
        for name in ("role", "content"):
            self.message_property_mappings.setdefault(name, name)
        if self.chat_template_jinja and self.chat_template not in (None, "jinja"):
            raise ValueError(
                f"`chat_template_jinja` needs `chat_template: jinja`, not {self.chat_template!r}"
            )
        if self.chat_template_jinja:
            self.chat_template = "jinja"
        if self.chat_template:
            _check_template(self.chat_template, self.chat_template_jinja)
        return self


class _Thresholds(ConversationOptions):
    grades: list[float] | None = Field(default=None, min_length=1)
    positive_min: float | None = Field(default=None, strict=False, allow_inf_nan=False)
    negative_max: float | None = Field(default=None, strict=False, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_thresholds(self) -> "_Thresholds":
        if (self.positive_min is None) != (self.negative_max is None):
            raise ValueError("`positive_min` and `negative_max` go together: set both or none")
        low, high = self.negative_max, self.positive_min
        if low is not None and high is not None and high <= low:
            raise ValueError(f"`positive_min: {high:g}` must be above `negative_max: {low:g}`")
        if self.grades is not None:
            if not all(isfinite(grade) for grade in self.grades):
                raise ValueError(f"`grades: {self.grades}`: write finite numbers")
            if not are_rising(self.grades):
                raise ValueError(f"`grades: {self.grades}`: write the thresholds in rising order")
            if low is not None:
                raise ValueError("`grades` and `positive_min` both divide the ratings: keep one")
        return self


class DefaultOptions(_Thresholds):
    """``chat_template.default``: one response per row."""

    field_completion: str = "completion"
    field_label: str = "label"


class PairedOptions(ConversationOptions):
    """``chat_template.paired``: a chosen and a rejected response per row."""

    field_chosen: str = "chosen"
    field_rejected: str = "rejected"


class PairOptions(PairedOptions):
    """Axolotl's chat-template types for pairs, which read the prompt from `messages`."""

    prefers_messages: ClassVar[bool] = True


class ListwiseOptions(_Thresholds):
    """``chat_template.listwise``: several responses per row.

    The responses are either the elements of a list column (``field_responses``; then
    ``field_completion`` and ``field_label`` name members of an element) or separate columns (then
    both are lists of column names).
    """

    field_responses: str | None = None
    field_completion: str | list[str] = "response"
    field_label: str | list[str] = "label"
    field_preference: str | None = None
    best_and_worst: bool = False
    lower_is_better: bool = False

    @model_validator(mode="after")
    def _check_listwise(self) -> "ListwiseOptions":
        columns = isinstance(self.field_completion, list)
        if columns == (self.field_responses is not None):
            raise ValueError(
                "name the responses once: `field_responses` for a list column, or a list of "
                "columns in `field_completion`"
            )
        if self.field_preference is not None:
            if not isinstance(self.field_completion, list) or len(self.field_completion) != 2:
                raise ValueError("`field_preference` compares two columns in `field_completion`")
            others = {"field_label", "best_and_worst", "positive_min", "grades"}
            others &= self.model_fields_set
            if others:
                raise ValueError(
                    f"`field_preference` and `{min(others)}` both decide the labels: keep one"
                )
        elif isinstance(self.field_label, list) != columns or (
            columns and len(self.field_label) != len(self.field_completion)
        ):
            raise ValueError(
                "`field_label` must have the form of `field_completion`: one name with "
                "`field_responses`, else a list of as many columns"
            )
        if self.best_and_worst and (given := {"positive_min", "grades"} & self.model_fields_set):
            raise ValueError(
                f"`best_and_worst` and `{min(given)}` both decide the labels: keep one"
            )
        if self.lower_is_better and not self.best_and_worst:
            raise ValueError("`lower_is_better` needs `best_and_worst: true`")
        return self

    def responses(self, row: Mapping[str, Any], cell: Cell) -> Iterator[tuple[Any, str]]:
        """Yields the mapping and the key under which each response of a row is found."""
        return self._parts(row, self.field_completion, cell)

    def labels(self, row: Mapping[str, Any], cell: Cell) -> Iterator[tuple[Any, str]]:
        """Yields the mapping and the key of each response's label, in the same order."""
        return self._parts(row, self.field_label, cell)

    def _parts(
        self, row: Mapping[str, Any], field: str | list[str], cell: Cell
    ) -> Iterator[tuple[Any, str]]:
        if isinstance(field, list):
            yield from ((row, column) for column in field)
        elif self.field_responses is not None:
            yield from ((part, field) for part in cell(row, self.field_responses) or [])


class ThreadsOptions(ConversationOptions):
    """``chat_template.threads``: a message of a conversation tree per row."""

    field_id: str = "message_id"
    field_parent: str = "parent_id"
    field_text: str = "text"
    field_role: str = "role"
    field_rank: str = "rank"

    @model_validator(mode="after")
    def _check_threads(self) -> "ThreadsOptions":
        columns = ("field_messages", "field_prompt", "field_system", "field_tools")
        others = {*columns, "message_property_mappings"} & self.model_fields_set
        if others:
            raise ValueError(f"`{min(others)}` has no meaning where each row is one message")
        return self


def columns_named(options: ConversationOptions, present: Collection[str]) -> set[str]:
    """The columns that are read of those present, also for a member (``column.member``)."""
    names = vars(options).copy()
    prompts = ["field_prompt", "field_messages"]
    if options.prefers_messages:
        prompts.reverse()
    written = [name for name in prompts if name in options.model_fields_set]
    there = [name for name in prompts if names[name] in present]
    for other in set(prompts) - set((written or there)[:1]):
        names.pop(other)
    found: set[str] = set()
    for value in names.values():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):
                found |= {name, name.partition(".")[0]}
    return found & set(present)


def thresholds(options: ConversationOptions) -> list[float]:
    """Those that turn an entry's ratings into levels or labels; none where it has labels."""
    if not isinstance(options, _Thresholds):
        return []
    pair = (options.negative_max, options.positive_min)
    return options.grades or [at for at in pair if at is not None]


def plain(value: Any) -> Any:
    """Converts nested mappings and sequences to built-in dicts and lists.

    The host's config wraps mappings in a class whose missing keys are None.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _check_template(choice: str, jinja: str | None) -> None:
    from axolotl.utils.chat_templates import get_chat_template

    # The tokenizer's own template is not known yet.
    if not choice.startswith("tokenizer_default"):
        get_chat_template(choice, jinja_template=jinja)
