"""Parameter-efficient training methods: a protocol (``base``), an implementation per file, and a ``registry``.

Importing the package registers the built-in methods without importing their implementations.
"""

from deltaw.methods import settings as _built_in  # noqa: F401
