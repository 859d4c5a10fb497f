"""CAMP without its parts, on the demo's world: `python -m tools.ablation runs/demo` after `make demo`.

Every variant starts from the demo's own first stage and trains the second one at the demo's settings and seed; figures of the test split go to data/results.
"""
import json
import sys
from pathlib import Path

from imtm_lite.cli import commit, figures, show_figures
from imtm_lite.data import Split
from imtm_lite.train import load, recipe, train

VARIANTS = {'released': {}, 'element-wise gate': dict(gate='elementwise'), 'no gate': dict(gate='none'), 'sum instead of concatenation': dict(fusion='sum'),
            'no residual': dict(residual=False), 'mean pooling': dict(pool='mean')}

if __name__ == '__main__':
    demo = Path(sys.argv[1])
    stage1, test = demo / 'camp' / 'stage1' / 'best.safetensors', Split(demo / 'world', 'test')
    seed = load(stage1).card['settings']['seed']
    results = {'stage 1 alone': figures(load(stage1), test)}
    for name, change in VARIANTS.items():
        stage = recipe('camp', 'demo', dict(arguments=change))[-1]
        best = train(data=demo / 'world', out=demo / 'ablation' / name.replace(' ', '-'), start=stage1, seed=seed, resume=True, device='cpu', **stage)
        results[name] = figures(load(best), test)
        show_figures(results, f'ablation of CAMP, second stage, seed {seed}')
    record = dict(models=results, seed=seed, protocol='plain', fingerprint=test.fingerprint(), library=commit())
    (Path(__file__).parent.parent / 'data' / 'results' / f'ablation-seed{seed}.json').write_text(json.dumps(record, indent=1))
