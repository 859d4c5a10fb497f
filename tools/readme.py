"""README.md from nbs/index.ipynb: `python -m tools.readme`.

Prose stands as it is, with links made relative to the root; of code cells, what a reader sees.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def relink(text: str) -> str:
    "Links written for nbs/ as the root needs them."

    def link(match):
        target = match[1]
        if target.startswith(('http', '#')):
            return match[0]
        if target.startswith('../'):
            return f']({target[3:]})'
        return f'](nbs/{target})'

    return re.sub(r'\]\(([^)\s]+)\)', link, text)


def shown_output(output: dict) -> str | None:
    "What an output of a cell shows: Markdown as it is, text in a block."
    data = output.get('data', {})
    if 'text/markdown' in data:
        return ''.join(data['text/markdown'])
    if output['output_type'] == 'stream' or 'text/plain' in data:
        text = ''.join(output.get('text') or data['text/plain'])
        return f'```\n{text.rstrip()}\n```'
    return None


def shown(cell: dict) -> list[str]:
    "What the reader sees of a cell."
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        return [source]
    if '#| hide' in source:
        return []
    blocks = [] if '#| echo: false' in source else [f'```python\n{source}\n```']
    outputs = [shown_output(output) for output in cell['outputs']]
    return blocks + [text for text in outputs if text is not None]


def readme(notebook: Path) -> str:
    "The text of README.md."
    blocks = ['<!-- made from nbs/index.ipynb by: make readme -->']
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        blocks += [relink(text) for text in shown(cell)]
    return '\n\n'.join(blocks) + '\n'


if __name__ == '__main__':
    (ROOT / 'README.md').write_text(readme(ROOT / 'nbs' / 'index.ipynb'), encoding='utf-8')
