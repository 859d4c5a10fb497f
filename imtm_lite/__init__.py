__version__ = "0.1.0"


def __getattr__(name):
    "`imtm_lite.load(path)`: the matcher of a checkpoint. Imported on first use, so that a lesson's module stays light."
    if name == 'load':
        from .checkpoints import load
        return load
    raise AttributeError(f"module 'imtm_lite' has no attribute {name!r}")
