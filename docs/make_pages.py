#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the manual page, and the completions for bash and zsh, from the words of --help.

usage: make_pages.py [FOLDER]     (default: the folder of this script)
"""
import os
import re
import subprocess
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
import rmgradient  # noqa: E402

FILES = {'input', 'output', 'background', 'save_points', 'preview', 'report', 'points_file', 'reference', 'mask'}
WORDS = {'sky': rmgradient.SKIES, 'smooth': ['auto']}  # and numbers

# The library shtab offers no files after the first one of -i, no options after -p 1 2, and splits names with spaces.
BASH = r'''# bash completion for rmgradient, made by docs/make_pages.py

_rmgradient() {
    local word=${COMP_WORDS[COMP_CWORD]} option= first=$((COMP_CWORD + 1)) i
    COMPREPLY=()
    compopt -o default -o bashdefault 2> /dev/null  # without a reply, the shell completes files, and quotes them
    for ((i = COMP_CWORD - 1; i > 0; i--)); do
        if [[ ${COMP_WORDS[i]} == -[a-z]* || ${COMP_WORDS[i]} == --* ]]; then
            option=${COMP_WORDS[i]} first=$((i + 1))
            break
        fi
    done
    if [[ ${COMP_WORDS[first]} == '=' ]]; then first=$((first + 1)); fi  # --sky=gray is three words
    if [[ $word == '=' ]]; then word=; first=$COMP_CWORD; fi
    if [[ $word != -* ]]; then
        case $option in
            MANY) return ;;
        esac
        if ((COMP_CWORD == first)); then
            case $option in
                ONE) return ;;
CHOICES
                OTHER) compopt +o default +o bashdefault 2> /dev/null; return ;;
            esac
        fi
    fi
    compopt +o default +o bashdefault 2> /dev/null
    COMPREPLY=($(compgen -W 'OPTIONS' -- "$word"))
}

complete -o default -o bashdefault -F _rmgradient rmgradient
'''

ZSH = r'''#compdef rmgradient
# zsh completion for rmgradient, made by docs/make_pages.py

_rmgradient_more() {  # words of options that may have one, or any number
    if [[ $PREFIX == -* || $1 == : ]]; then compadd -- OPTIONS; else $1; fi
}

_arguments \
LINES
'''

FILES_SECTION = r'''.SH FILES
.TP
points file (\-f, \-\-save\-points)
One pair X Y in each line. Text after a pair is a comment, and so is text after #.
.TP
.I .rmgradient\-*
Outputs have such a name in their folder until they are complete. A killed program can leave one. It can be removed.
'''

SEE_ALSO = r'''.SH SEE ALSO
.BR xargs (1),
.BR parallel (1),
.BR siril (1),
.BR exiftool (1)
.PP
The folder docs of the repository has more pages, for example when.rst, points.rst, messages.rst and python.rst.
'''


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    actions = rmgradient.build_parser()._actions
    (folder / 'rmgradient.bash').write_text(bash_completion(actions))
    (folder / '_rmgradient').write_text(zsh_completion(actions))
    make_manual(folder / 'rmgradient.1')


def options_of(actions, chosen=lambda action: True):
    return [option for action in actions if chosen(action) for option in action.option_strings]


def bash_completion(actions):
    def pattern(chosen):
        return '|'.join(options_of(actions, chosen))

    def takes_files(action):
        return action.dest in FILES

    choices = [f"                {'|'.join(action.option_strings)}) compopt +o default +o bashdefault 2> /dev/null\n"
               f"                    COMPREPLY=($(compgen -W '{' '.join(WORDS[action.dest])}' -- \"$word\")); return ;;"
               for action in actions if action.dest in WORDS]
    parts = {
        'MANY': pattern(lambda action: takes_files(action) and action.nargs == '+'),
        'ONE': pattern(lambda action: takes_files(action) and action.nargs is None),
        'CHOICES': '\n'.join(choices),
        'OTHER': pattern(lambda action: action.nargs is None and not takes_files(action) and action.dest not in WORDS),
        'OPTIONS': ' '.join(options_of(actions))}
    return re.sub('|'.join(parts), lambda found: parts[found[0]], BASH)


def zsh_completion(actions):
    lines = []
    for action in actions:
        text = f"[{re.split('[.:;(]', action.help)[0].strip()}]"
        if action.nargs != 0:
            many = {'+': ':*-*', '?': ':'}.get(action.nargs, '')
            what = action.metavar if isinstance(action.metavar, str) else ' '.join(action.metavar)
            offered = '_files' if action.dest in FILES else ' '
            if action.dest in WORDS:
                offered = f'({" ".join(WORDS[action.dest])})'
            if action.nargs:
                offered = f' _rmgradient_more {offered.strip() or ":"}'
            text += f'{many}:{what}:{offered}'
        star = '*' if action.dest in ('input', 'points') else ''
        lines += [f"  '{star}{option}{text}'" for option in action.option_strings]
    return ZSH.replace('OPTIONS', ' '.join(options_of(actions))).replace('LINES', ' \\\n'.join(lines))


def make_manual(path):
    """Let argparse-manpage describe the options, and put the parts of the docstring under headings of their own."""
    options = {'pyfile': here.parent / 'rmgradient.py', 'function': 'build_parser', 'project-name': 'rmgradient',
               'prog': 'rmgradient', 'version': rmgradient.__version__, 'manual-title': 'User Commands',
               'description': rmgradient.__doc__.split('.\n')[0], 'output': path}
    subprocess.run([sys.executable, '-c', 'from argparse_manpage.cli import main; main()',
                    *(f'--{name}={value}' for name, value in options.items())],
                   check=True, env={**os.environ, 'COLUMNS': '100'})
    page = path.read_text()
    parts = r'(^Exit status:\n.*?\n\n)(^Examples:\n\n.*?)(?=^\.SH)'
    before, status, examples, after = re.split(parts, page, maxsplit=1, flags=re.MULTILINE | re.DOTALL)
    status = status.replace('Exit status:\n', '.SH EXIT STATUS\n')
    examples = re.sub(r'((?:^    .*\n)+)', r'.nf\n\1.fi\n', examples, flags=re.MULTILINE)  # lines stay as they are
    examples = examples.replace('Examples:\n\n', '.SH EXAMPLES\n')
    path.write_text(before + after.rstrip() + '\n\n' + examples + FILES_SECTION + status.rstrip() + '\n' + SEE_ALSO)


if __name__ == '__main__':
    main()
