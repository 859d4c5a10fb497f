"Package metadata, read from settings.ini (the file that nbdev keeps)."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(here / 'settings.ini', encoding='utf-8')
s = config['DEFAULT']

EXTRAS = ('dev', 'transformers', 'spacy', 'course', 'grading')

setup(
    name=s['lib_name'], version=s['version'], description=s['description'], keywords=s['keywords'],
    author=s['author'], author_email=s['author_email'], url=s['git_url'], license='Apache-2.0',
    long_description=(here / 'README.md').read_text(encoding='utf-8') if (here / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    packages=find_packages(include=['imtm_lite', 'imtm_lite.*']),
    python_requires=f">={s['min_python']}", install_requires=s['requirements'].split(),
    extras_require={extra: s[f'{extra}_requirements'].split() for extra in EXTRAS},
    entry_points={'console_scripts': [s['console_scripts']]}, zip_safe=False,
)
