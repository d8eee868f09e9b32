# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r"^__version__ = '(.+)'", (here / 'rmgradient.py').read_text(encoding='utf-8'), re.MULTILINE)[1]

setup(
    name='rmgradient',
    version=version,
    description='Remove the background gradient from TIFF and FITS pictures of the sky',
    long_description=(here / 'README.rst').read_text(encoding='utf-8'),
    long_description_content_type='text/x-rst',
    license='Apache-2.0',
    license_files=['LICENSE'],
    py_modules=['rmgradient'],
    data_files=[('share/man/man1', ['docs/rmgradient.1']),
                ('share/bash-completion/completions', ['docs/rmgradient.bash']),
                ('share/zsh/site-functions', ['docs/_rmgradient'])],
    entry_points={'console_scripts': ['rmgradient = rmgradient:run']},
    python_requires='>=3.11',
    install_requires=['numpy>=1.26', 'scipy>=1.11.2', 'tifffile[codecs]>=2024.8.10', 'threadpoolctl>=3.1.0',
                      'tqdm>=4.60.0'],
    extras_require={
        'plot': ['matplotlib>=3.8'],
        'fits': ['astropy>=6.0'],  # to unpack what fpack has packed, and for coordinates in the sky
        'align': ['astroalign>=2.5'],  # references with other pixels
        'test': ['pytest>=8', 'pytest-cov>=5', 'pytest-xdist>=3.5', 'hypothesis>=6.100', 'matplotlib>=3.8',
                 'astropy>=6.0', 'ruff>=0.11', 'codespell>=2.3', 'argparse-manpage>=4.6', 'mypy>=1.10',
                 'astroalign>=2.5', 'docutils>=0.20', 'distributed>=2024.1', 'tornado>=6.3'],
    },
    keywords='astrophotography background gradient light pollution TIFF FITS radial basis function',
    classifiers=[
        'Environment :: Console',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Astronomy',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
)
