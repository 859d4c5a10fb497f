"README.md from nbs/index.ipynb: `python -m tools.readme`. Prose as it stands, links made relative to the root, code with what it gave."

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def relink(text: str) -> str:
    "Links written for nbs/ as the root needs them."

    def link(m):
        target = m[1]
        if target.startswith(('http', '#')):
            return m[0]
        return f']({target[3:]})' if target.startswith('../') else f'](nbs/{target})'

    return re.sub(r'\]\(([^)\s]+)\)', link, text)


def shown(cell: dict) -> list[str]:
    "What the reader sees of a code cell."
    source = ''.join(cell['source'])
    if '#| hide' in source:
        return []
    parts = [] if '#| echo: false' in source else [f'```python\n{source}\n```']
    for out in cell['outputs']:
        data = out.get('data', {})
        if 'text/markdown' in data:
            parts.append(''.join(data['text/markdown']))
        elif out['output_type'] == 'stream' or 'text/plain' in data:
            parts.append(
                '```\n' + ''.join(out.get('text') or data['text/plain']).rstrip('\n') + '\n```'
            )
    return parts


def readme(notebook: Path) -> str:
    "The text of README.md."
    parts = ['<!-- made from nbs/index.ipynb by: make readme -->']
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        parts += (
            [relink(''.join(cell['source']))]
            if cell['cell_type'] == 'markdown'
            else map(relink, shown(cell))
        )
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    (ROOT / 'README.md').write_text(readme(ROOT / 'nbs' / 'index.ipynb'), encoding='utf-8')
