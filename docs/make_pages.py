#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the manual page, and completions for bash and zsh, from the words of --help.

usage: make_pages.py [FOLDER]     (default: the folder of this script)
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import shtab

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
import rmgradient  # noqa: E402

FILES = {'input', 'output', 'background', 'save_points', 'preview', 'points_file', 'reference', 'mask'}


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    parser = rmgradient.build_parser()
    for action in parser._actions:
        if action.nargs == '+':
            action.nargs = None  # shtab's script for bash offers nothing else once it takes any number
        if action.dest in FILES:
            action.complete = shtab.FILE
        if action.dest == 'sky':
            action.choices = list(rmgradient.SKIES)  # and numbers, which need no completion
    for shell, name in (('bash', 'rmgradient.bash'), ('zsh', '_rmgradient')):
        (folder / name).write_text(shtab.complete(parser, shell) + '\n')
    options = {'pyfile': here.parent / 'rmgradient.py', 'function': 'build_parser', 'project-name': 'rmgradient',
               'prog': 'rmgradient', 'version': rmgradient.__version__, 'manual-title': 'User Commands',
               'description': rmgradient.__doc__.split('.\n')[0], 'output': folder / 'rmgradient.1'}
    subprocess.run([sys.executable, '-c', 'from argparse_manpage.cli import main; main()',
                    *(f'--{name}={value}' for name, value in options.items())],
                   check=True, env={**os.environ, 'COLUMNS': '100'})
    page = (folder / 'rmgradient.1').read_text().replace('python rmgradient.py', 'rmgradient')
    page = re.sub(r'((?:^    .*\n)+)', r'.nf\n\1.fi\n', page, flags=re.MULTILINE)  # examples are not filled
    (folder / 'rmgradient.1').write_text(page)


if __name__ == '__main__':
    main()
