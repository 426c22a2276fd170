"""diffjax: a functional research codebase for diffusion and flow models in JAX."""

__version__ = '0.1.0'


def __getattr__(name: str):
    """`diffjax.load`, imported when it is first used: `import diffjax` alone stays light."""
    if name == 'load':
        from diffjax.loading import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
