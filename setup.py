"Package metadata, read from settings.ini (the file that nbdev keeps)."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(here / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']

CLASSIFIERS = [
    'Development Status :: 3 - Alpha',
    'Environment :: Console',
    'Framework :: Jupyter',
    'Intended Audience :: Developers',
    'Intended Audience :: Education',
    'Intended Audience :: Science/Research',
    'Natural Language :: English',
    'Operating System :: OS Independent',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.10',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Topic :: Scientific/Engineering :: Image Recognition',
    'Typing :: Typed',
]
EXTRAS = ('dev', 'torchtext', 'transformers', 'spacy', 'course', 'grading')


class Build(build_py):
    "Leaves out what only nbdev reads."

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != '_modidx']


setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=settings['keywords'],
    author=settings['author'],
    author_email=settings['author_email'],
    url=settings['git_url'],
    license_expression='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=CLASSIFIERS,
    packages=find_packages(include=['imtm_lite', 'imtm_lite.*']),
    package_data={'imtm_lite': ['py.typed', 'shipped/**']},
    python_requires=f">={settings['min_python']}",
    install_requires=settings['requirements'].split(),
    extras_require={name: settings[f'{name}_requirements'].split() for name in EXTRAS},
    entry_points={'console_scripts': [settings['console_scripts']]},
    cmdclass={'build_py': Build},
    zip_safe=False,
)
