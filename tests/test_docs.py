# SPDX-License-Identifier: Apache-2.0
"""Manual page, completions and the pages of the documentation say what the program does."""
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import scipy.interpolate
import tifffile
from helpers import ROOT

import rmgradient as rg

OPTIONS = sorted({option for action in rg.build_parser()._actions for option in action.option_strings})


@pytest.fixture(scope='module')
def made(tmp_path_factory):
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


class Shell:
    """An interactive shell in a terminal, in which the completion is set up."""

    STARTS = {'bash': f'. {ROOT}/docs/rmgradient.bash', 'zsh': f'fpath=({ROOT}/docs $fpath); autoload -U compinit; '
              'compinit -u -d dump; setopt no_beep; bindkey -e'}

    def __init__(self, name, folder):
        self.process, self.terminal = os.forkpty()
        if not self.process:
            os.chdir(folder)
            os.execvpe(name, [name, *{'bash': ['--norc', '--noprofile'], 'zsh': ['-f']}[name], '-i'],
                       {**os.environ, 'TERM': 'dumb', 'PS1': '', 'HISTFILE': ''})
        self.say(f'stty -echo; {self.STARTS[name]}; echo rea""dy\n')
        self.hear('ready')

    def say(self, text):
        os.write(self.terminal, text.encode())

    def hear(self, mark, times=1):
        said = ''
        while said.count(mark) < times:
            said += os.read(self.terminal, 4096).decode(errors='replace')
        return said

    def completed(self, words, wait):
        """Return the words of a command line after the Tab key."""
        self.say(f'rmgradient {words}\t')
        time.sleep(wait)  # what is typed meanwhile may be taken for an answer, or for a part of the word
        self.say('\001printf "<%s>" END \005 END\n')  # to the begin of the line, and to its end
        said = self.hear('<END>', 2)
        return re.findall('<([^<>]*)>', said.split('<END>')[1])[1:]

    def close(self):
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.terminal)


@pytest.mark.parametrize('name', ['bash', 'zsh'])
def test_shells_complete(tmp_path, name):
    if not (shutil.which(name) and hasattr(os, 'forkpty')):
        pytest.skip(f'needs {name} and a terminal')
    best = "my 'best' sky.tif"
    for file in ('one.tif', 'two.tif', best):
        (tmp_path / file).touch()
    shell = Shell(name, tmp_path)
    try:
        for words, *expected in (('--sa', '--save-points'), ('--sky d', '--sky', 'darkest'), ('-m a', '-m', 'auto'),
                                 ('-i one.tif tw', '-i', 'one.tif', 'two.tif'),
                                 ('-i one.tif my', '-i', 'one.tif', best),
                                 ('-i "my', '-i', best), ('-p 1 2 --ref', '-p', '1', '2', '--reference'),
                                 ('-i one.tif --ref', '-i', 'one.tif', '--reference'), ('-a --ov', '-a', '--overwrite'),
                                 ('-o tw', '-o', 'two.tif'), ('-o one.tif --repo', '-o', 'one.tif', '--report')):
            if shell.completed(words, 0.15) != expected:
                assert shell.completed(words, 2) == expected  # a busy machine
    finally:
        shell.close()


def test_api_page_is_that_of_the_docstrings(tmp_path):
    subprocess.run([sys.executable, ROOT / 'docs' / 'make_api.py', tmp_path / 'api.rst'], check=True)
    text = (ROOT / 'docs' / 'api.rst').read_text()
    assert text == (tmp_path / 'api.rst').read_text()
    assert all(f'\n{name}\n{"-" * len(name)}\n' in text for name in rg.__all__)


def public_docstrings():
    """Yield the docstrings of the public names, and the comments of their fields."""
    source = inspect.getsource(rg)
    for name in rg.__all__:
        value = getattr(rg, name)
        yield name, value.__doc__
        if inspect.isclass(value):
            fields = re.split(r'\n    (?:@|def )|\n\n\n', source.partition(f'\nclass {name}')[2])[0]
            yield name, '\n'.join(re.findall(r'^    \w+: .*(#.*)$', fields, re.MULTILINE))
            yield from ((name, each.__doc__ or '') for key, each in vars(value).items() if not key.startswith('_'))


def test_public_docstrings_name_public_things():
    """What is in backquotes is a public name, or belongs to the value or its parameters."""
    for name, text in public_docstrings():
        value = getattr(rg, name)
        known = {*rg.__all__, *vars(value), *vars(rg.Correction), 'settings', 'picture', 'numpy', 'sys', 'with'}
        if not inspect.isclass(value):
            known |= set(inspect.signature(value).parameters)
        for quoted in re.findall(r'`([^`]+)`', text):
            if name not in ('Picture', 'Correction'):  # some of their methods are for the program alone
                assert re.match(r'\w+', quoted)[0] in known, (name, quoted)


def test_values_have_short_names():
    sky = np.random.default_rng(1).normal(1000, 10, (200, 300, 3))
    places = [(x, y) for x in range(30, 280, 40) for y in (30, 100, 160)] + [(-200, -10)]
    correction = rg.find_correction(sky, places)
    measured = correction.fit.measured
    for value in (correction, correction.fit, measured, measured.points, correction.model, correction.fit.adaptive,
                  correction.verdict, correction.settings, correction.picture):
        assert len(repr(value)) < 240, value
        assert type(value).__name__.removeprefix('Array') in repr(value)
    assert repr(measured.points) == '<Points: 21 measured, 1 on isolines>'
    assert repr(correction.picture) == '<Picture in memory: 300 x 200 pixels, 3 channels, float64>'


def mean_sentence(text):
    """Return the mean number of words in the sentences of paragraphs and lists."""
    paragraphs = [' '.join(block.split()) for block in re.split(r'\n\s*\n', text)
                  if not re.match(r'\s{4}|[=.+-]{3}|\.\. |\S+\n[=-]{3}', block)]
    paragraphs = [part for paragraph in paragraphs for part in re.split(r'(?:^| )- ', paragraph) if part]
    sentences = [words for paragraph in paragraphs for words in re.split(r'(?<=[.?!])[)]? ', paragraph)
                 if len(words.split()) > 1]
    return sum(len(words.split()) for words in sentences) / len(sentences)


@pytest.mark.parametrize('page', ['README.rst', *sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.rst'))])
def test_sentences_are_short(page):
    assert mean_sentence((ROOT / page).read_text(encoding='utf-8')) <= 18
    assert mean_sentence('One two three four. Five six.\n\n    code is not counted at all, however long it is\n') == 3


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of Dask's own
def test_dask_corrects_on_two_processes(tmp_path):
    """The script of the page, which runs a local cluster of two processes. One picture is none."""
    pytest.importorskip('distributed')
    text = (ROOT / 'docs' / 'many.rst').read_text(encoding='utf-8')
    script = re.search(r'\n    import glob\n.*?\n(?=\S)', text, re.DOTALL)[0]
    (tmp_path / 'dask_night.py').write_text(textwrap.dedent(script))
    (tmp_path / 'night').mkdir()
    sky = np.random.default_rng(1).normal(1000, 10, (250, 300)).astype(np.uint16)
    for name in 'ab':
        tifffile.imwrite(tmp_path / 'night' / f'{name}.tif', sky)
    (tmp_path / 'night' / 'c.tif').write_text('no picture')
    done = subprocess.run([sys.executable, 'dask_night.py'], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), 'DASK_DISTRIBUTED__DASHBOARD__LINK': ''})
    assert done.stdout == "['night/c.tif']\n", done.stderr
    assert 'rmgradient: error: night/c.tif: is not a TIFF or FITS picture' in done.stderr
    assert sorted(os.listdir(tmp_path / 'corrected')) == ['a.tif', 'b.tif']


@pytest.mark.skipif(not shutil.which('xargs'), reason='needs xargs')
def test_old_command_gives_the_old_result(tmp_path):
    """The command of the page for users of 2019, and its way written out: each pixel is the same."""
    text = (ROOT / 'docs' / 'from2019.rst').read_text(encoding='utf-8')
    command, = re.findall('^    (cat input_points.+)$', text, re.MULTILINE)
    sky = tifffile.imread(ROOT / 'test_data' / 'sky.tif')[:200, :300]
    tifffile.imwrite(tmp_path / 'image.tif', sky, photometric='rgb')
    points = np.array([(30, 30), (150, 40), (270, 30), (40, 100), (260, 110), (30, 170), (140, 160), (270, 170),
                       (-90, -90)])
    (tmp_path / 'input_points').write_text('\n'.join(f'{x} {y}' for x, y in points) + '\n')
    shutil.copy(ROOT / 'rmgradient.py', tmp_path)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'})
    assert done.returncode == 0, done.stderr
    weights = np.exp(-np.arange(-24, 25) ** 2 / (2 * 8.0**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    levels = []
    for x, y in points:
        window = sky[y - 24:y + 25, x - 24:x + 25].astype(float)
        levels.append(np.einsum('ij,ijk->k', weights, window) if x > 0 else levels[-1])
    y, x = np.mgrid[:200, :300]
    expected = sky.astype(float)
    for channel, values in enumerate(np.transpose(levels)):
        background = scipy.interpolate.Rbf(*np.abs(points.T), values, function='multiquadric', smooth=0.1)(x, y)
        expected[..., channel] -= background - background.min()
    assert (tifffile.imread(tmp_path / 'output.tif') == np.clip(np.rint(expected), 0, 65535)).all()


def test_example_of_a_format_works(tmp_path, monkeypatch):
    """The class of the page on development, with a header of three words."""
    text = (ROOT / 'docs' / 'development.rst').read_text(encoding='utf-8')
    code = textwrap.dedent(re.search(r'\n    class PnmImage.*?\n(?=\S)', text, re.DOTALL)[0])

    def parse_pnm_header(data):
        found = re.match(rb'(P[56])\s+(\d+)\s+(\d+)\s+(\d+)\s', data)
        return found[1], *(int(found[i]) for i in (2, 3, 4)), found.end()

    monkeypatch.chdir(tmp_path)
    space = {**vars(rg), 'parse_pnm_header': parse_pnm_header}
    exec(code, space)
    monkeypatch.setattr(rg, 'FORMATS', (*rg.FORMATS, space['PnmImage']))
    sky = tifffile.imread(ROOT / 'test_data' / 'sky.tif')
    head = f'P6 {sky.shape[1]} {sky.shape[0]} 65535\n'.encode()
    (tmp_path / 'sky.ppm').write_bytes(head + sky.astype('>u2').tobytes())
    for path in ('sky.ppm', ROOT / 'test_data' / 'sky.tif'):
        out = f'out{os.path.splitext(path)[1]}'
        assert rg.main(['-q', '-i', str(path), '-o', out, '-f', str(ROOT / 'test_data' / 'skypoints'), '-r', '33']) == 0
    data = (tmp_path / 'out.ppm').read_bytes()
    assert data.startswith(head)
    pixels = np.frombuffer(data, '>u2', offset=len(head)).reshape(sky.shape)
    assert (pixels == tifffile.imread(tmp_path / 'out.tif')).all()
    (tmp_path / 'cut.ppm').write_bytes(data[:-1])
    assert rg.main(['-i', 'cut.ppm', '-o', 'no.ppm', '-a']) == 1
    assert not (tmp_path / 'no.ppm').exists()


def test_links_lead_somewhere():
    for page in [ROOT / 'README.rst', *(ROOT / 'docs').glob('*.rst')]:
        text = page.read_text(encoding='utf-8')
        for target in re.findall(r'<([\w/.]+)(?:#[\w-]+)?>`_|^\.\. image:: (\S+)', text, re.MULTILINE):
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
