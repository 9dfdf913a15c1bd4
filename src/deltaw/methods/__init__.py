"""The ways to train few parameters: one file each, one small protocol (``base``), one ``registry``.

Importing the package registers the built-in methods, and none of their code.
"""

from deltaw.methods import settings as _built_in  # noqa: F401
