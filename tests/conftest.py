# SPDX-License-Identifier: Apache-2.0
import pytest
from helpers import Cli


def pytest_configure(config):
    """Ignore our own warnings: drawn pictures are often doubtful. Here, since coverage has begun."""
    config.addinivalue_line('filterwarnings', 'ignore::rmgradient.RmgradientWarning')


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Cli(tmp_path, capsys)
