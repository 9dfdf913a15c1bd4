"""The trained parameters at the best point of a training, kept in a temporary file.

In memory they would count among what the training needs: for full fine-tuning, four bytes more for each
parameter. Nothing is serialized: the file holds the numbers as they are, and lives as long as the object.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor


class BestPoint:
    """A copy of parameters on disk; a context manager.

    Attributes:
        step, loss: where it was taken, and the validation loss there; step 0 before the first.
    """

    def __init__(self) -> None:
        self.step = 0
        self.loss = float("inf")
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._dtypes: list[torch.dtype] = []

    def __enter__(self) -> BestPoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @torch.no_grad()
    def take(self, step: int, loss: float, parameters: Sequence[Tensor]) -> None:
        """Keep these in place of what was kept before."""
        self._file.seek(0)
        for parameter in parameters:
            flat = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._file.write(flat.numpy().data)
        self._file.truncate()
        self._dtypes = [parameter.dtype for parameter in parameters]
        self.step, self.loss = step, loss

    @torch.no_grad()
    def put_back(self, parameters: Sequence[Tensor]) -> None:
        """Copy what was kept into parameters of the same shapes, rounded to their types, one at a time."""
        self._file.seek(0)
        for parameter, dtype in zip(parameters, self._dtypes, strict=True):
            if not parameter.numel():
                continue
            buffer = np.empty(parameter.numel() * dtype.itemsize, dtype=np.uint8)
            self._file.readinto(buffer.data)
            parameter.copy_(torch.from_numpy(buffer).view(dtype).reshape(parameter.shape))
