"""Disk cache of expensive results, keyed by everything that they depend on."""
