"""Gives each process that runs tests what they share (common.py). The one that hands tests out to several has no use for it, and
would need seconds to import it before the others begin.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("common")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("common")
