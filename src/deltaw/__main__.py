"""Entry point of ``python -m deltaw``, equivalent to the ``deltaw`` command."""

from deltaw.cli import main

main()
