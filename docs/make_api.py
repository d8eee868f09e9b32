#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make api.rst from the docstrings of the public names.

usage: make_api.py [FILE]     (default: api.rst beside this script)
"""
import inspect
import re
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
import rmgradient  # noqa: E402

HEAD = '''API reference
=============

These are the public names of the module ``rmgradient``. `Python <python.rst>`_ has examples.

.. This page is made by docs/make_api.py.

.. contents::
   :local:
'''

# Members of classes that users need. The program uses others.
MEMBERS = {
    'BackgroundModel': ['n_channels', 'blocks', 'evaluate', 'at_grid'],
    'Correction': ['points', 'levels', 'model', 'apply'],
    'Measured': ['subset'],
    'Picture': ['read', 'usable', 'physical', 'close'],
    'Points': ['on_isoline', 'centers', 'pairs', 'subset'],
}


def with_links(text):
    """Return text with links to public names, and other names in a fixed font."""
    return re.sub(r'`([^`\n]+)`', lambda found: f'{found[1]}_' if found[1] in rmgradient.__all__ else f'``{found[1]}``',
                  text)


def as_rst(value):
    """Return the docstring of a value, in the style of numpy, as reStructuredText."""
    text = with_links(inspect.getdoc(value)).replace('**settings', r'\*\*settings')
    text = re.sub(r'^(\w+)\n-+$', r'**\1**\n', text, flags=re.MULTILINE)
    return re.sub(r'^(\w+)( : .+)$', r'*\1*\2', text, flags=re.MULTILINE)


SOURCE = inspect.getsource(rmgradient)


def fields_of(value):
    """Yield lines for the fields of a value, with the comments of the source."""
    source = SOURCE[SOURCE.index(f'\nclass {value.__name__}'):]
    for name in inspect.get_annotations(value):
        declared = re.search(rf'^    {name}: ([^#\n]+?)(?:  # (.+))?$', source, re.MULTILINE)
        kind, _, default = declared[1].partition(' = ')
        default = repr(getattr(value, name)) if hasattr(value, name) and not hasattr(value, '_fields') else \
            repr(value._field_defaults[name]) if name in getattr(value, '_field_defaults', {}) else default
        is_short = default and '<' not in default and '(' not in default.replace('()', '')
        yield f'*{name}* : {kind}' + (f', default ``{default}``' if is_short else '')
        yield f'    {with_links(declared[2] or f"`{kind}`")}'


def signature(name, function):
    """Return a call with names and defaults, without annotations."""
    parameters = [each.replace(annotation=inspect.Parameter.empty)
                  for each in inspect.signature(function).parameters.values() if each.name != 'self']
    return name + str(inspect.Signature(parameters))


def section(name):
    """Yield the lines about a public name."""
    value = getattr(rmgradient, name)
    yield from (name, '-' * len(name), '')
    if inspect.isfunction(value):
        yield from ('::', '', f'    {signature(name, value)}', '')
    yield from (as_rst(value), '')
    if inspect.get_annotations(value) and inspect.isclass(value):
        yield from ('**Fields**', '', *fields_of(value), '')
    for member in MEMBERS.get(name, []):
        each = vars(value)[member]
        yield from (f'``{signature(member, each) if inspect.isfunction(each) else member}``', '')
        yield from ('    ' + line if line else '' for line in as_rst(each).split('\n'))
        yield ''


def main():
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else here / 'api.rst'
    names = sorted(rmgradient.__all__, key=lambda name: (name[0].isupper(), name))
    path.write_text('\n'.join([HEAD, *(line for name in names for line in section(name))]).rstrip() + '\n')


if __name__ == '__main__':
    main()
