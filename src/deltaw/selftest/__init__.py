"""Self-test of an installation, for machines that the developers do not have. See :mod:`deltaw.selftest.run`."""
