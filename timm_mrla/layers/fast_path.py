"""The place where another room puts a faster way to compute a layer."""

from collections.abc import Callable
from typing import Any

from torch import nn


class FastPath(nn.Module):
    """Base of the layers: `fast_path(layer, *args of forward)` returns forward's result, or None if it cannot run."""

    fast_path: Callable[..., Any] | None = None  # for all layers, the last line of timm_mrla/ops/__init__.py sets it
