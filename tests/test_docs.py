# SPDX-License-Identifier: Apache-2.0
"""Manual page, completions and the pages of the documentation say what the program does."""
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

import rmgradient as rg

OPTIONS = sorted({option for action in rg.build_parser()._actions for option in action.option_strings})


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    pytest.importorskip('shtab')
    pytest.importorskip('argparse_manpage')
    folder = tmp_path_factory.mktemp('pages')
    subprocess.run([sys.executable, ROOT / 'docs' / 'make_pages.py', folder], check=True)
    return folder


@pytest.mark.parametrize('name', ['rmgradient.1', 'rmgradient.bash', '_rmgradient'])
def test_pages_are_those_of_the_parser(made, name):
    text = (ROOT / 'docs' / name).read_text()
    plain = text.replace('\\-', '-').replace('\\fR', '')
    assert all(option in plain for option in OPTIONS if option != '--help')  # every command has that
    if sys.version_info[:2] == (3, 11):  # others lay out the usage in their own way; the first line has the date
        assert text.splitlines()[1:] == (made / name).read_text().splitlines()[1:]
    assert name != 'rmgradient.1' or rg.__version__ in text.splitlines()[0]


@pytest.mark.skipif(not shutil.which('man'), reason='needs man')
def test_manual_page_has_no_faults():
    done = subprocess.run(['man', '--warnings', '-l', ROOT / 'docs' / 'rmgradient.1'], capture_output=True, text=True,
                          env={**os.environ, 'MANWIDTH': '80', 'LC_ALL': 'C.UTF-8'})
    assert (done.returncode, done.stderr) == (0, '')
    assert 'rmgradient - Remove the background gradient' in re.sub(' +', ' ', done.stdout)


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
@pytest.mark.parametrize(('words', 'expected'), [('--sa', ['--save-points']), ('--sky d', ['darkest']),
                                                 ('--ref', ['--reference'])])
def test_bash_completes(words, expected):
    words = ['rmgradient', *words.split()]
    script = (f'source {ROOT}/docs/rmgradient.bash\nCOMP_WORDS=({" ".join(words)})\nCOMP_CWORD={len(words) - 1}\n'
              f'_shtab_rmgradient\nprintf "%s\\n" "${{COMPREPLY[@]}}"')
    done = subprocess.run(['bash', '-c', script], capture_output=True, text=True)
    assert done.stdout.split() == expected


@pytest.mark.skipif(not shutil.which('zsh'), reason='needs zsh')
def test_zsh_reads_the_completion():
    assert subprocess.run(['zsh', '-n', ROOT / 'docs' / '_rmgradient']).returncode == 0


def test_links_lead_somewhere():
    for page in [ROOT / 'README.rst', *(ROOT / 'docs').glob('*.rst')]:
        text = page.read_text(encoding='utf-8')
        for target in re.findall(r'<([\w/.]+)>`_|^\.\. image:: (\S+)', text, re.MULTILINE):
            path = target[0] or target[1]
            assert (page.parent / path).exists(), f'{page.name}: {path}'
        docutils = pytest.importorskip('docutils.core')
        settings = {'report_level': 2, 'halt_level': 2, 'file_insertion_enabled': False}
        docutils.publish_string(text, source_path=str(page), writer='html', settings_overrides=settings)


def test_examples_for_python_are_typed(tmp_path):
    """As `mypy --strict` sees them, which reads the annotations of the module."""
    pytest.importorskip('mypy')
    text = (ROOT / 'docs' / 'python.rst').read_text(encoding='utf-8')
    lines = re.findall(r'^(?:>>>|\.\.\.) ?(.*)$', text, re.MULTILINE)
    (tmp_path / 'examples.py').write_text('\n'.join(lines) + '\n')
    done = subprocess.run([sys.executable, '-m', 'mypy', '--strict', '--follow-imports=silent', 'examples.py'],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'MYPYPATH': str(ROOT)})
    assert done.returncode == 0, done.stdout
