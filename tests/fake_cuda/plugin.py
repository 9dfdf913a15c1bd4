"""Pytest plugin that installs the fake device: ``pytest -p tests.fake_cuda.plugin``."""

from tests.fake_cuda.device import install

install()
