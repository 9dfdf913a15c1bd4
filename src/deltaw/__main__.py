"""`python -m deltaw`: the same as the `deltaw` command."""

from deltaw.cli import main

main()
