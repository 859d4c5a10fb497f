import pytest
import torch

from imtm_lite.world.write import write_world


def pytest_configure(config):
    config.addinivalue_line('markers', "slow: needs a large file; leave out with -m 'not slow'")


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    "A small generated data set, made once."
    root = tmp_path_factory.mktemp('data') / 'world'
    write_world(root, train=80, dev=24, test=24, seed=3, progress=False)
    return root


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
