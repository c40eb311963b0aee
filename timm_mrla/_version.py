"""The version of this package, in a file of its own: pyproject.toml reads it, and modules import it from here."""

__version__ = '0.1.0'
