"""The long form runs only if it is asked for, by ``-m exactness_long``."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "exactness_long" in config.getoption("markexpr"):
        return
    long = [item for item in items if item.get_closest_marker("exactness_long")]
    if long:
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
