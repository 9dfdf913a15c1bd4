"""Regression heads that are trained on standardized labels and return numbers in the units of the labels.

A regression head is a linear layer that computes W·x + b. In training, W and b refer to standardized labels, and the
layer's output is multiplied by the scale of the labels and shifted by their mean. Saved weights include both
(W' = scale·W, b' = scale·b + mean), so every program that loads them returns the units of the labels.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.methods.files import read_metadata
from deltaw.training.task import head_modules

# Metadata key of the weights file: means and scales of the labels that the head was trained on, as JSON.
LABELS_KEY = "deltaw.labels"
# Ratio of two scales, and distance of two means in scales, up to which labels count as the same quantity.
_MAX_CHANGE = 4.0
# Regularization of the direction that predicts the mean, relative to the mean squared norm of the vectors.
_RIDGE = 1e-3


@dataclass(frozen=True)
class LabelUnits:
    """Mean and scale of each target of a regression.

    Attributes:
        mean: (targets,) means.
        scale: (targets,) population standard deviations.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of_labels(cls, labels: Sequence[float | tuple[float, ...]]) -> LabelUnits:
        """Return the units of labels."""
        values = np.asarray(labels, np.float64).reshape(len(labels), -1)
        return cls(tuple(values.mean(0).tolist()), tuple(values.std(0).tolist()))

    @classmethod
    def of_adapter(cls, folder: Path, targets: int) -> LabelUnits | None:
        """Return the units of the labels that an adapter was trained on, or None if it does not contain them."""
        try:
            values = json.loads(read_metadata(folder).get(LABELS_KEY, "null"))
            units = cls(*(tuple(map(float, values[name])) for name in ("mean", "scale")))
        except (ValueError, TypeError, KeyError):
            return None
        is_valid = all(map(math.isfinite, units.mean)) and all(0 < scale < math.inf for scale in units.scale)
        return units if is_valid and len(units.mean) == len(units.scale) == targets else None

    def is_similar(self, other: LabelUnits) -> bool:
        """True if both can be units of one quantity, so that predictions of one are useful for the other."""
        targets = zip(self.mean, self.scale, other.mean, other.scale, strict=True)
        return all(
            max(scale, other_scale) <= _MAX_CHANGE * min(scale, other_scale)
            and abs(mean - other_mean) <= _MAX_CHANGE * max(scale, other_scale)
            for mean, scale, other_mean, other_scale in targets
        )

    def __str__(self) -> str:
        parts = (f"mean {mean:.5g}, scale {scale:.5g}" for mean, scale in zip(self.mean, self.scale, strict=True))
        return "; ".join(parts)


class RegressionHead(nn.Linear):
    """Linear layer for standardized labels, with output in the units of the labels.

    It computes in fp32 also in a model of 16 bits, whose numbers have three digits. Without a bias, as in decoders, it
    only scales its output, because its saved form cannot contain the mean.

    Attributes:
        units: Units of the labels.
    """

    units: LabelUnits

    @classmethod
    def convert(cls, linear: nn.Linear) -> RegressionHead:
        """Convert a layer in place. It returns the same numbers, except for rounding."""
        if not isinstance(linear, RegressionHead):
            linear.to(torch.promote_types(linear.weight.dtype, torch.float32))
            linear.__class__ = cls
            assert isinstance(linear, RegressionHead)
            linear.units = LabelUnits((0.0,) * linear.out_features, (1.0,) * linear.out_features)
        return linear

    @property
    def is_standardized(self) -> bool:
        """True if the weights refer to standardized labels."""
        return self.units != LabelUnits((0.0,) * self.out_features, (1.0,) * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input.to(self.weight.dtype))
        means = self.units.mean if self.bias is not None else (0.0,) * self.out_features
        columns = zip(output.unbind(-1), self.units.scale, means, strict=True)
        return torch.stack([column * scale + mean for column, scale, mean in columns], -1)

    @torch.no_grad()
    def standardize(self, units: LabelUnits) -> None:
        """Convert weights that include mean and scale to standardized labels. The output is unchanged."""
        self.units = units
        scale, mean = self._unit_tensors()
        self.weight.copy_(self.weight / scale[:, None])
        if self.bias is not None:
            self.bias.copy_((self.bias - mean) / scale)

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """Return the weights that include mean and scale."""
        scale, mean = self._unit_tensors()
        weights = {"weight": self.weight * scale[:, None]}
        if self.bias is not None:
            weights["bias"] = self.bias * scale + mean
        return {name: tensor.to(self.weight.dtype) for name, tensor in weights.items()}

    def _unit_tensors(self) -> tuple[Tensor, Tensor]:
        device = self.weight.device
        scale = torch.tensor(self.units.scale, dtype=torch.float64, device=device)
        return scale, torch.tensor(self.units.mean, dtype=torch.float64, device=device)

    @contextlib.contextmanager
    def saved_form(self) -> Iterator[None]:
        """Context in which the weights include mean and scale."""
        folded = self.folded()
        standardized = {name: getattr(self, name).data for name in folded}
        try:
            for name, value in folded.items():
                getattr(self, name).data = value
            yield
        finally:
            for name, value in standardized.items():
                getattr(self, name).data = value

    @torch.no_grad()
    def predict_mean(self, vectors: Sequence[Tensor]) -> None:
        """Let a new head without bias start near the mean of the labels.

        Adds the direction u with the least Σ (u·x − 1)², times the mean of each target. The vectors x of a language
        model have a large common part, so u·x is close to 1 for other rows, too.

        Args:
            vectors: Inputs of the head, (…, width) each.
        """
        inputs = torch.cat([part.reshape(-1, self.in_features) for part in vectors]).to("cpu", torch.float64)
        products = inputs @ inputs.T
        products.diagonal().add_(_RIDGE * products.diagonal().mean())
        direction = inputs.T @ torch.linalg.solve(products, torch.ones(len(inputs), dtype=torch.float64))
        scale, mean = self._unit_tensors()
        self.weight.add_(torch.outer((mean / scale).cpu(), direction).to(self.weight))


def find_head(model: nn.Module) -> nn.Linear | None:
    """Return the last linear layer of a model's head, or None if its outputs are not those of the model."""
    modules = [module for name in head_modules(model) for module in model.get_submodule(name).modules()]
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    outputs = getattr(model.config, "num_labels", None)
    return linear[-1] if linear and linear[-1].out_features == outputs else None


def regression_head(model: nn.Module) -> RegressionHead | None:
    """Return the converted head of a model, or None."""
    head = find_head(model)
    return head if isinstance(head, RegressionHead) else None
