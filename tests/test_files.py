# SPDX-License-Identifier: Apache-2.0
"""Outputs are complete or absent, whatever happens."""
import errno
import itertools
import os
import signal
import struct
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
    assert cli.files() == (['out.tif', 'sky.tif'] if late == 'out.tif' else ['bg.tif', 'out.tif', 'sky.tif'])
    assert late == 'out.tif' or tifffile.imread('out.tif').shape == cli.sky.shape  # complete before its turn came
    assert (cli.folder / late).read_text() == 'precious'


def test_replaced_file_keeps_its_mode_and_owner(cli):
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
    assert time.time() - path.stat().st_mtime < 60  # it is new
    assert cli.files() == ['out.tif', 'sky.tif']


def acl(*entries):
    """Return an access list as Linux stores it: version 2, then (tag, permissions, id) of each entry."""
    return struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *entry) for entry in entries)


def test_replaced_file_keeps_its_access_list_and_attributes(cli):
    """Its mode shows the mask of the list where the group's would be: set alone, the group gains access."""
    path, nobody = cli.folder / 'out.tif', 2**32 - 1
    path.write_text('old')
    # Owner rw, user 1234 rw, group nothing, mask rw, others nothing.
    wanted = acl((1, 6, nobody), (2, 6, 1234), (4, 0, nobody), (16, 6, nobody), (32, 0, nobody))
    try:
        os.setxattr(path, 'system.posix_acl_access', wanted)
        os.setxattr(path, 'user.note', b'mine')
    except (OSError, AttributeError):
        pytest.skip('no access lists here')
    assert cli('--overwrite') == 0
    assert tifffile.imread(path).shape == cli.sky.shape
    assert os.getxattr(path, 'system.posix_acl_access') == wanted
    assert os.getxattr(path, 'user.note') == b'mine'


@pytest.mark.parametrize('overwrite', [False, True])
def test_file_that_appears_meanwhile_is_replaced_only_if_that_is_wanted(cli, monkeypatch, overwrite):
    write_pictures = rg.write_pictures

    def race(*arguments):
        (cli.folder / 'out.tif').write_text('new')
        (cli.folder / 'out.tif').chmod(0o640)
        return write_pictures(*arguments)
    monkeypatch.setattr(rg, 'write_pictures', race)
    assert cli(*['--overwrite'] * overwrite) == (0 if overwrite else 1)
    assert (tifffile.imread('out.tif').shape == cli.sky.shape) if overwrite else (
        (cli.folder / 'out.tif').read_text() == 'new')
    assert (cli.folder / 'out.tif').stat().st_mode & 0o777 == 0o640
    assert cli.files() == ['out.tif', 'sky.tif']


def test_nothing_has_its_name_before_all_are_complete(cli, monkeypatch):
    write_pictures = rg.write_pictures

    def look(*arguments):
        done = write_pictures(*arguments)
        assert [name for name in cli.files() if not name.startswith('.rmgradient-')] == ['sky.tif']
        return done
    monkeypatch.setattr(rg, 'write_pictures', look)
    assert cli('-b', 'bg.tif', '--preview', 'p.png', '--save-points', 'p') == 0
    assert cli.files() == ['bg.tif', 'out.tif', 'p', 'p.png', 'sky.tif']


def strace_works():
    try:
        done = subprocess.run(['strace', '-f', '-qq', '-o', os.devnull, '-e', 'inject=fsync:error=EIO', 'true'],
                              capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


needs_strace = pytest.mark.skipif(not strace_works(), reason='needs strace')


def run_with_fault(cli, calls, fault, *arguments):
    """Run the command with system calls that fail; return status and message."""
    command = ['strace', '-f', '-qq', '-o', os.devnull, '-e', f'trace={calls}', '-e', f'inject={calls}:{fault}',
               sys.executable, ROOT / 'rmgradient.py', '-q', '-i', 'sky.tif', '-o', 'out.tif', *arguments, '-p',
               *words(cli.points)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cli.folder,
                          env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'})
    return done.returncode, done.stderr


@needs_strace
def test_file_system_without_links(cli):
    """As Linux, FUSE and macOS say it; names are given by renaming then, and nothing is replaced unasked."""
    for number, code in enumerate(('EPERM', 'EOPNOTSUPP', 'ENOSYS')):
        assert run_with_fault(cli, 'link,linkat', f'error={code}', '-o', f'{number}.tif', '-b', 'bg.tif',
                              '--overwrite') == (0, '')
        assert tifffile.imread(f'{number}.tif').shape == tifffile.imread('bg.tif').shape == cli.sky.shape
    assert cli.files() == ['0.tif', '1.tif', '2.tif', 'bg.tif', 'sky.tif']


@needs_strace
@pytest.mark.parametrize(('calls', 'overwrite', 'most'), [
    ('fsync', False, 3), ('fsync', True, 3), ('link,linkat', False, 2), ('rename,renameat,renameat2', True, 2)])
def test_nth_system_call_fails(cli, calls, overwrite, most):
    """Whatever fails, and when: one line, each output whole or as before, and no other file."""
    for n in range(1, most + 2):
        for name in ('out.tif', 'bg.tif'):
            (cli.folder / name).unlink(missing_ok=True)
            if overwrite:
                (cli.folder / name).write_text('old')
        status, message = run_with_fault(cli, calls, f'error=EIO:when={n}', '-b', 'bg.tif',
                                         *['--overwrite'] * overwrite)
        if n > most:
            break
        assert status == 1, f'number {n} failed unnoticed'
        assert message.count('\n') == 1
        assert 'Input/output error' in message
        assert set(cli.files()) <= {'bg.tif', 'out.tif', 'sky.tif'}
        whole = [name for name in ('out.tif', 'bg.tif') if (cli.folder / name).exists()
                 and (cli.folder / name).read_bytes() != b'old']
        assert all(tifffile.imread(name).shape == cli.sky.shape for name in whole)
        assert len(whole) == {'fsync': 0 if n < 3 else 2}.get(calls, n - 1)
    assert (status, message) == (0, '')
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


def is_writing(folder):
    """Whether a process has begun to write into a folder."""
    return any(name.startswith('.rmgradient-') for name in os.listdir(folder))


def test_kill_at_any_moment_leaves_no_part_of_an_output(cli):
    rng = np.random.default_rng(1)
    tifffile.imwrite('sky.tif', rng.integers(1000, 2000, (700, 700, 3), np.uint16), photometric='rgb')
    arguments = ['-q', '-i', 'sky.tif', '-o', 'out.tif', '-b', 'bg.tif', '-c', 9, '-p', *words(cli.points * 6)]
    start, n_writing = time.monotonic(), 0
    assert run(*arguments, cwd=cli.folder).communicate()[1] == ''
    duration = time.monotonic() - start
    assert cli.files() == ['bg.tif', 'out.tif', 'sky.tif']
    for i in range(8):
        for name in ('bg.tif', 'out.tif'):
            (cli.folder / name).unlink(missing_ok=True)
        process = run(*arguments, cwd=cli.folder)
        if i < 3:
            time.sleep(i / 3 * duration)
        else:
            while process.poll() is None and not is_writing(cli.folder):
                time.sleep(0.001)
            n_writing += process.poll() is None
            time.sleep((i - 3) / 5 * 0.6 * duration)
        process.kill()
        process.communicate()
        # Hidden files may be left, and between the two links one of two outputs may be there, complete.
        hidden = [name for name in cli.files() if name.startswith('.rmgradient-')]
        for name in set(cli.files()) - {'sky.tif', *hidden}:
            assert name in ('bg.tif', 'out.tif')
            assert tifffile.imread(name).shape == (700, 700, 3)
        for name in hidden:
            (cli.folder / name).unlink()
    assert n_writing >= 4


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
    while not is_writing(cli.folder):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(getattr(signal, number))
    start = time.monotonic()
    _, message = process.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert process.returncode == status, message
    assert 'Traceback' not in message
    assert 'error: ' not in message
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
