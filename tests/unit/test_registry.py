"""What is registered, by whom, and what a mistake is told."""

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pluggy
import pytest
import torch

from aot_plugin import hookspecs, registry
from aot_plugin.hookspecs import hookimpl
from aot_plugin.ot.penalties import PENALTIES

DOC = Path(__file__).parents[2] / "docs" / "extending.md"
HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "aot_plugin_spec")]


class Exponential:
    @hookimpl
    def aot_penalties(self):
        return {"exponential": lambda z, beta: torch.exp(-beta * z)}


class Misspelt:
    @hookimpl
    def aot_penaltys(self):
        return {}


class WithArgument:
    @hookimpl
    def aot_penalties(self, config):
        return {}


class Empty:
    """A package that adds nothing."""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Pretend that these packages, by distribution name, are what is installed beside ours."""

    def install(**packages: type) -> None:
        class Distribution:
            def __init__(self, name: str) -> None:
                self.name = name

        class Entry(EntryPoint):
            def load(self):
                return packages[self.dist.name]()

        def entry_points(group: str) -> list[EntryPoint]:
            assert group == "aot_plugin"
            ours = EntryPoint("builtin", registry.BUILTIN, group)._for(Distribution("aot-plugin"))
            others = (Entry("plugin", "x", group)._for(Distribution(name)) for name in packages)
            return [ours, *others]

        monkeypatch.setattr(registry, "entry_points", entry_points)

    registry.plugin_manager.cache_clear()
    yield install
    registry.plugin_manager.cache_clear()


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_builtin_penalties_come_through_the_hooks(name: str):
    assert registry.lookup("aot_penalties", "aot_penalty", name) is PENALTIES[name]
    (implementation,) = (
        hook
        for hook in registry.plugin_manager().hook.aot_penalties.get_hookimpls()
        if hook.plugin_name == "aot-plugin (builtin)"
    )
    assert implementation.function() is PENALTIES


def test_builtin_losses_come_through_the_hooks():
    from aot_plugin.ot.losses import transport

    assert registry.lookup("aot_losses", "aot_loss", "transport") is transport


def test_another_package_joins_the_builtins(installed: Callable):
    installed(other=Exponential, nothing=Empty)
    assert set(registry.registered("aot_penalties")) == {"exponential", *PENALTIES}
    penalty = registry.lookup("aot_penalties", "aot_penalty", "exponential")
    assert penalty(torch.zeros(2), 0.1).tolist() == [1.0, 1.0]


def test_an_unknown_name_lists_what_is_known(installed: Callable):
    installed(other=Exponential)
    with pytest.raises(ValueError) as error:
        registry.lookup("aot_penalties", "aot_penalty", "hinge")
    assert str(error.value) == (
        "`aot_penalty: hinge` is not known; write one of "
        "exponential, least_squares, logistic, squared_hinge"
    )


def test_a_name_registered_twice_names_both_packages(installed: Callable):
    """Both chose the same entry-point name as well, which must not hide the second one."""
    installed(first=Exponential, second=Exponential)
    with pytest.raises(ValueError, match=r"'exponential' .*'\w+ \(plugin\)' and by ") as error:
        registry.registered("aot_penalties")
    assert "'first (plugin)'" in str(error.value) and "'second (plugin)'" in str(error.value)


def test_a_builtin_name_can_not_be_taken(installed: Callable):
    class Usurper:
        @hookimpl
        def aot_losses(self):
            return {"transport": None}

    installed(usurper=Usurper)
    with pytest.raises(ValueError, match=r"'transport'.*'aot-plugin \(builtin\)'") as error:
        registry.registered("aot_losses")
    assert "'usurper (plugin)'" in str(error.value)
    assert set(registry.registered("aot_penalties")) == set(PENALTIES)  # these are not disputed


@pytest.mark.parametrize(
    ("plugin", "named"), [(Misspelt, "aot_penaltys"), (WithArgument, r"careless \(plugin\)")]
)
def test_a_hook_that_does_not_exist_is_an_error(installed: Callable, plugin: type, named: str):
    installed(careless=plugin)
    with pytest.raises(pluggy.PluginValidationError, match=named):
        registry.plugin_manager()


@pytest.mark.parametrize("returned", [None, [("exponential", None)], {1: None}])
def test_a_hook_that_returns_no_mapping_from_names_is_named(installed: Callable, returned: object):
    class Careless:
        @hookimpl
        def aot_penalties(self):
            return returned

    installed(careless=Careless)
    with pytest.raises(ValueError, match=r"aot_penalties of 'careless \(plugin\)' returned"):
        registry.registered("aot_penalties")


def test_there_are_hooks():
    assert {"aot_penalties", "aot_losses", "aot_prompt_strategies"} <= set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented(hook: str):
    documentation = getattr(hookspecs, hook).__doc__
    assert documentation and len(documentation.split()) > 10
    assert f"def {hook}():" in DOC.read_text()
