# SPDX-License-Identifier: Apache-2.0
import pytest
from helpers import Cli


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Cli(tmp_path, capsys)
