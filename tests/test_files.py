# SPDX-License-Identifier: Apache-2.0
"""Outputs are complete or absent, whatever happens."""
import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers import ROOT, words

import rmgradient as rg

resource = pytest.importorskip('resource')  # links, modes, signals and limits of POSIX


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_mode_is_that_of_umask(cli):
    before = os.umask(0o027)
    try:
        assert cli() == 0
    finally:
        os.umask(before)
    assert (cli.folder / 'out.tif').stat().st_mode & 0o777 == 0o640


def test_names_of_full_length(cli):
    name = 'ä' * 125 + '.tif'  # 254 bytes
    assert cli('-o', name) == 0
    assert name in cli.files()


def test_link_stays_and_its_file_is_written(cli):
    (cli.folder / 'real').mkdir()
    os.symlink('real/out.tif', 'out.tif')
    assert cli('--overwrite') == 0
    assert os.path.islink('out.tif')
    assert tifffile.imread('real/out.tif').shape == cli.sky.shape
    assert os.listdir('real') == ['out.tif']


def test_devices_stay_devices(cli):
    assert cli('-o', '/dev/null', '-b', '/dev/null') == 0
    assert not os.path.isfile('/dev/null')
    if os.path.exists('/dev/full'):
        cli.fails('-o', '/dev/full', match='/dev/full: No space left on device')
        cli.fails('-b', '/dev/full', match='/dev/full: No space left on device')
        cli.fails('--save-points', '/dev/full', match='/dev/full: No space left on device')
        os.symlink('/dev/full', 'full.png')
        cli.fails('--preview', 'full.png', match='full.png: No space left on device')
    os.mkfifo('fifo')
    cli.fails('-o', 'fifo', '--overwrite', match='fifo: is not a regular file')


@pytest.mark.parametrize('late', ['out.tif', 'bg.tif'])
def test_file_that_appears_meanwhile_is_left_alone(cli, monkeypatch, late):
    write_pictures = rg.write_pictures

    def race(*arguments):
        (cli.folder / late).write_text('precious')
        return write_pictures(*arguments)
    monkeypatch.setattr(rg, 'write_pictures', race)
    assert cli('-b', 'bg.tif') == 1
    assert f'{late}: File exists' in cli.stderr
    assert cli.files() == sorted([late, 'sky.tif'])
    assert (cli.folder / late).read_text() == 'precious'


@pytest.fixture(params=['nameless', 'named'])
def way(request, monkeypatch):
    """Files without a name until they are complete, as on Linux, and with a temporary one, as elsewhere."""
    if request.param == 'named':
        monkeypatch.delattr(os, 'O_TMPFILE', raising=False)
    elif not hasattr(os, 'O_TMPFILE'):
        pytest.skip('needs O_TMPFILE')
    return request.param


def test_replaced_file_keeps_its_mode(cli, way):
    path = cli.folder / 'out.tif'
    path.write_text('old')
    for mode in (0o600, 0o664, 0o444):
        path.chmod(mode)
        assert cli('--overwrite') == 0
        assert path.stat().st_mode & 0o7777 == mode
    if os.getuid() == 0:
        os.chown(path, 1234, 4321)
        assert cli('--overwrite') == 0
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)
    assert cli.files() == ['out.tif', 'sky.tif']


def test_file_that_appears_meanwhile_is_replaced_if_that_is_wanted(cli, monkeypatch, way):
    link, appeared = os.link, []

    def race(source, name, **how):
        if not appeared:
            appeared.append(name)
            (cli.folder / 'out.tif').write_text('new')
        link(source, name, **how)
    monkeypatch.setattr(os, 'link', race)
    assert cli('--overwrite') == 0
    assert appeared == [os.path.realpath('out.tif')]
    assert tifffile.imread('out.tif').shape == cli.sky.shape
    assert cli.files() == ['out.tif', 'sky.tif']


@pytest.mark.skipif(not hasattr(os, 'O_TMPFILE'), reason='needs O_TMPFILE')
def test_nothing_has_a_name_before_it_is_complete(cli, monkeypatch):
    write_pictures = rg.write_pictures

    def look(*arguments):
        done = write_pictures(*arguments)
        assert cli.files() == ['sky.tif']
        return done
    monkeypatch.setattr(rg, 'write_pictures', look)
    assert cli('-b', 'bg.tif', '--preview', 'p.png', '--save-points', 'p') == 0
    assert cli.files() == ['bg.tif', 'out.tif', 'p', 'p.png', 'sky.tif']


@pytest.mark.parametrize('code', [errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_file_system_without_links(cli, monkeypatch, code):
    monkeypatch.delattr(os, 'O_TMPFILE', raising=False)  # such a file system has none
    def link(*_, **__):
        raise OSError(code, 'no links')
    monkeypatch.setattr(os, 'link', link)
    assert cli('-b', 'bg.tif') == 0
    (cli.folder / 'bg.tif').write_text('old')
    assert cli('-b', 'bg.tif', '--overwrite') == 0
    assert tifffile.imread('bg.tif').shape == cli.sky.shape
    assert cli.files() == ['bg.tif', 'out.tif', 'sky.tif']


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('name', ['open', 'fsync', 'link', 'replace', 'close'])
def test_nth_system_call_fails(cli, monkeypatch, name, overwrite, way):
    """Whatever fails, and when: one line, and the folder as it was."""
    if (name, way) == ('open', 'nameless'):
        pytest.skip('a file with a name takes its place')
    if overwrite:
        for path in ('out.tif', 'bg.tif'):
            (cli.folder / path).write_text(f'old {path}')
    before = contents(cli.folder)
    real = getattr(os, name)
    for n in range(100):
        calls = itertools.count()

        def fail(*arguments, calls=calls, n=n, **more):
            if next(calls) == n:
                if name == 'close':
                    real(*arguments)  # a failing close closes all the same
                raise OSError(errno.EIO, 'Input/output error')
            return real(*arguments, **more)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            status = cli('-q', '-b', 'bg.tif', *['--overwrite'] * overwrite)
        if next(calls) <= n:
            break
        assert status == 1, f'{name} number {n} failed unnoticed'
        assert cli.stderr.count('\n') == 1
        assert 'Input/output error' in cli.stderr
        assert contents(cli.folder) == before
    assert n >= {'open': 3, 'fsync': 3, 'link': 2, 'replace': 2 * overwrite, 'close': 1}[name]
    assert status == 0
    assert cli.files() == ['bg.tif', 'out.tif', 'sky.tif']


@pytest.mark.parametrize('name', ['write', 'flush', 'seek'])
def test_nth_write_fails(cli, monkeypatch, name):
    before = cli.files()
    real = os.fdopen
    for n in range(200):
        calls = itertools.count()

        class Faulty:
            def __init__(self, *arguments):
                self._file = real(*arguments)

            def __getattr__(self, attribute):
                method = getattr(self._file, attribute)
                if attribute != name:
                    return method

                def fail(*arguments):
                    if next(calls) == n:  # noqa: B023
                        raise OSError(errno.ENOSPC, 'No space left on device')
                    return method(*arguments)
                return fail
        with monkeypatch.context() as patch:
            patch.setattr(os, 'fdopen', Faulty)
            status = cli('-q', '-b', 'bg.tif', '-r', 30)
        if status == 0:
            break
        assert cli.stderr.count('\n') == 1
        assert 'No space left on device' in cli.stderr
        assert cli.files() == before
    assert n >= 2


@pytest.mark.parametrize('n', range(0, 48, 7))
def test_nth_read_fails(cli, monkeypatch, n):
    calls, real = itertools.count(), os.pread

    def fail(*arguments):
        if next(calls) == n:
            raise OSError(errno.EIO, 'Input/output error')
        return real(*arguments)
    monkeypatch.setattr(os, 'pread', fail)
    cli.fails('-b', 'bg.tif', '-r', 5, match='Input/output error')


def run(*arguments, cwd, **options):
    return subprocess.Popen([sys.executable, str(ROOT / 'rmgradient.py'), *map(str, arguments)], cwd=cwd,
                            stderr=subprocess.PIPE, text=True, **options)


def test_file_size_limit(cli):
    process = run('-q', '-i', 'sky.tif', '-o', 'out.tif', '-p', *words(cli.points), cwd=cli.folder,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message == 'rmgradient: error: out.tif: File too large\n'
    assert cli.files() == ['sky.tif']


def test_full_file_system(cli):
    (cli.folder / 'small').mkdir()
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=40k', 'none', 'small'], capture_output=True)
    if mount.returncode:
        pytest.skip('mounting is not allowed')
    try:
        (cli.folder / 'small' / 'out.tif').write_text('old')
        assert cli('-o', 'small/out.tif', '--overwrite', '-q') == 1
        assert cli.stderr == 'rmgradient: error: small/out.tif: No space left on device\n'
        assert os.listdir('small') == ['out.tif']
        assert (cli.folder / 'small' / 'out.tif').read_text() == 'old'
    finally:
        subprocess.run(['umount', 'small'], check=True)


def is_writing(process, folder):
    """Tell whether a process has begun to write, to a file with a temporary name or without one."""
    with contextlib.suppress(OSError):  # it ends, or there is no /proc
        descriptors = f'/proc/{process.pid}/fd'
        if any(f'{folder}/#' in os.readlink(f'{descriptors}/{name}') for name in os.listdir(descriptors)):
            return True
    return any(name.startswith('.rmgradient-') for name in os.listdir(folder))


@pytest.mark.skipif(not os.path.exists('/proc/self/fd') or not hasattr(os, 'O_TMPFILE'), reason='needs Linux')
def test_kill_at_any_moment_leaves_nothing(cli):
    rng = np.random.default_rng(1)
    tifffile.imwrite('sky.tif', rng.integers(1000, 2000, (700, 700, 3), np.uint16), photometric='rgb')
    arguments = ['-q', '-i', 'sky.tif', '-o', 'out.tif', '-b', 'bg.tif', '-c', 9, '-p', *words(cli.points * 6)]
    start, n_writing = time.monotonic(), 0
    assert run(*arguments, cwd=cli.folder).communicate()[1] == ''
    duration = time.monotonic() - start
    assert cli.files() == ['bg.tif', 'out.tif', 'sky.tif']
    for i in range(10):
        for name in ('bg.tif', 'out.tif'):
            (cli.folder / name).unlink(missing_ok=True)
        process = run(*arguments, cwd=cli.folder)
        if i < 4:
            time.sleep(i / 4 * duration)
        else:
            while process.poll() is None and not is_writing(process, cli.folder):
                time.sleep(0.001)
            n_writing += process.poll() is None
            time.sleep((i - 4) / 6 * 0.6 * duration)
        process.kill()
        process.communicate()
        # Between the two links one of two files may be there, complete.
        assert set(cli.files()) <= {'bg.tif', 'out.tif', 'sky.tif'}
        for name in set(cli.files()) - {'sky.tif'}:
            assert tifffile.imread(name).shape == (700, 700, 3)
    assert n_writing >= 5


@pytest.mark.parametrize(('number', 'status', 'overwrite'), [
    ('SIGINT', 130, False), ('SIGINT', 130, True), ('SIGTERM', 143, True), ('SIGHUP', 129, False)])
def test_signals_leave_nothing(cli, number, status, overwrite):
    # The best compression of a large picture takes seconds: the signal comes while it is written.
    rng = np.random.default_rng(1)
    tifffile.imwrite('sky.tif', rng.integers(1000, 2000, (3000, 2000, 3), np.uint16), photometric='rgb')
    if overwrite:
        (cli.folder / 'out.tif').write_text('old')
    process = run('-i', 'sky.tif', '-o', 'out.tif', '-c', 9, '-p', *words(cli.points), *['--overwrite'] * overwrite,
                  cwd=cli.folder)
    while not is_writing(process, cli.folder):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(getattr(signal, number))
    start = time.monotonic()
    _, message = process.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert process.returncode == status
    assert 'Traceback' not in message
    assert 'error' not in message
    assert cli.files() == (['out.tif'] if overwrite else []) + ['sky.tif']
    assert not overwrite or (cli.folder / 'out.tif').read_text() == 'old'


def test_two_signals_at_once(cli):
    for delay in np.linspace(0.1, 0.5, 5):
        process = run('-i', 'sky.tif', '-o', 'out.tif', '-q', '-p', *words(cli.points), '--overwrite', cwd=cli.folder)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        _, message = process.communicate(timeout=60)
        assert message == ''


@pytest.mark.skipif(not os.path.exists('/proc/self/maps'), reason='needs /proc')
def test_interruption_while_libraries_load_is_quiet(cli):
    for library in ('_multiarray_umath', 'imagecodecs'):  # before the first is mapped, signals are handled already
        process = run('-i', 'sky.tif', '-o', 'out.tif', '-q', '-p', *words(cli.points), cwd=cli.folder)
        while process.poll() is None and library not in Path(f'/proc/{process.pid}/maps').read_text():
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
        assert message == ''
        assert process.returncode in (0, 130, -signal.SIGINT)
        (cli.folder / 'out.tif').unlink(missing_ok=True)
        assert cli.files() == ['sky.tif']


def test_signal_handlers_are_restored(cli):
    before = [signal.getsignal(number) for number in rg.SIGNALS]
    cli()
    assert [signal.getsignal(number) for number in rg.SIGNALS] == before
