import pytest
from processes import Start, starter


@pytest.fixture
def start() -> Start:
    return starter()
