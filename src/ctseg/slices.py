"""A 2D network that takes volumes, slice by slice. Imported only where one is built, as it brings MONAI along."""

from __future__ import annotations

from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor

__all__ = ["BasicUNet", "SliceUNet"]


class SliceUNet(BasicUNet):  # type: ignore[misc]  # MONAI has no types
    """MONAI's 2D BasicUNet on every slice across the last axis of a volume; weights have the same names."""

    def forward(self, image_BCXYZ: Tensor) -> Tensor:
        """The scores of all slices, `[B, C, X, Y, Z]`."""
        batch, _, _, _, slices = image_BCXYZ.shape
        scores: Tensor = super().forward(image_BCXYZ.permute(0, 4, 1, 2, 3).flatten(0, 1))
        return scores.view(batch, slices, *scores.shape[1:]).permute(0, 2, 3, 4, 1)
