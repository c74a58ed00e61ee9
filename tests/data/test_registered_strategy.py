"""A prompt strategy of another package, under the hook that our own are registered by."""

import pytest

from aot_plugin.data import resolve_unpaired_datasets
from aot_plugin.data.labels import Drop
from aot_plugin.data.options import ConversationOptions
from aot_plugin.data.rows import PromptStrategy, as_turns, example
from aot_plugin.data.strategy import outcomes
from aot_plugin.hookspecs import hookimpl
from aot_plugin.registry import plugin_manager


class EmojiOptions(ConversationOptions):
    field_emoji: str = "emoji"


def emoji_examples(row, options):
    label = {"👍": True, "👎": False, "🤏": 0.5}.get(row[options.field_emoji], Drop.UNLABELED)
    yield example(row, row["completion"], label, options)


class OtherPackage:
    def __init__(self, name):
        self._name = name

    @hookimpl
    def aot_prompt_strategies(self):
        return {self._name: PromptStrategy(EmojiOptions, emoji_examples)}


@pytest.fixture
def register():
    plugins = []

    def run(name):
        plugins.append(OtherPackage(name))
        plugin_manager().register(plugins[-1])

    yield run
    for plugin in plugins:
        plugin_manager().unregister(plugin)


def test_it_is_used_by_its_name(register):
    register("emoji.default")
    entry = {"path": "rows", "type": "emoji.default", "field_emoji": "face"}
    _, resolved = resolve_unpaired_datasets([entry])
    rows = [{"prompt": "Hi", "completion": "Yes.", "face": face} for face in "👍👎🤷"]
    found = [o for _, row in outcomes(rows, *resolved.values()) for o in row]
    assert [getattr(outcome, "label", outcome) for outcome in found] == [
        True,
        False,
        Drop.UNLABELED,
    ]
    assert found[0].prompt == as_turns("Hi", "user", EmojiOptions())
    with pytest.raises(ValueError, match=r"`datasets\[0\].field_face` is not an option of"):
        resolve_unpaired_datasets([{"path": "x", "type": "emoji.default", "field_face": "x"}])


def test_a_name_of_ours_can_t_be_taken(register):
    register("chat_template.default")
    with pytest.raises(ValueError, match="is registered by"):
        resolve_unpaired_datasets([{"path": "x", "type": "chat_template.default"}])


def test_a_level_of_its_own_is_refused_without_grades(register):
    """In a column of labels every level but 0 would be true."""
    register("emoji.default")
    _, resolved = resolve_unpaired_datasets([{"path": "rows", "type": "emoji.default"}])
    rows = [{"prompt": "Hi", "completion": "Yes.", "emoji": face} for face in "👍🤏"]
    with pytest.raises(ValueError, match=r"^rows, row 5: its strategy gives the level 0\.5, and"):
        list(outcomes(rows, *resolved.values(), numbers=[4, 5]))
