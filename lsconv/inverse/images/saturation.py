"""saturation_level: the grey level from which the pixels of an image are saturated."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, InputWarning, warn

__all__ = ["saturation_level"]


def saturation_level(image: Any, saturated: Any) -> float | None:
    """The grey level from which pixels are saturated; None where no pixel is.

    With "auto" it is the largest value of an integer image, if that is a plateau: at least four pixels have it, and
    more than have one of the eight values below it. An :class:`InputWarning` reports what was found.

    Args:
        image: a tensor or array.
        saturated: a grey level, "auto" or None.

    Raises:
        ArgumentError, ArgumentTypeError: no level, or "auto" for numbers that are no integers.

    Example:
        >>> image = torch.arange(64).clamp(max=50)
        >>> saturation_level(image, 50), saturation_level(image, None)
        (50.0, None)
    """
    if saturated is None:
        return None
    if not isinstance(saturated, str):
        if isinstance(saturated, bool) or not isinstance(saturated, (int, float)):
            raise ArgumentTypeError(f'saturated: expected a grey level, "auto" or None, got {saturated!r}')
        if not np.isfinite(saturated):
            raise ArgumentError(f"saturated: expected a finite grey level, got {saturated}")
        return float(saturated)
    if saturated != "auto":
        raise ArgumentError(f'saturated: expected a grey level, "auto" or None, got {saturated!r}')
    values = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.ma.asarray(image).compressed()
    if not np.issubdtype(values.dtype, np.integer):
        raise ArgumentError(f'saturated: "auto" looks for the plateau of an image of integers, got {image.dtype}; give '
                            f"the level")  # fmt: skip
    if values.size == 0:
        return None
    highest = int(values.max())
    top, below = int((values == highest).sum()), int(((values < highest) & (values >= highest - 8)).sum())
    if top < 4 or top <= below:
        warn(f'saturated="auto": no plateau at the top of the image ({top} pixel(s) at {highest})', InputWarning)
        return None
    warn(f'saturated="auto": {top} pixels at the top level {highest} are taken for saturated', InputWarning)
    return float(highest)
