__version__ = "0.2.0"


def __getattr__(name):
    "`imtm_lite.load(path)`: what a checkpoint holds; imported on first use, so that the package stays light."
    if name == 'load':
        from .checkpoints import load

        return load
    raise AttributeError(f"module 'imtm_lite' has no attribute {name!r}")
