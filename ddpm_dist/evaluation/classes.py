"""Of which class each drawn image is, and grids in which each class has a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Classes:
    """The class of each image that is drawn. It follows from the index of the image alone, and not from their number.

    Attributes:
        num_classes: number of classes of the run.
        only: the class of all images; None for all classes in turn, so that image i is of class i mod num_classes.
    """

    num_classes: int
    only: int | None = None

    def labels(self, indices: range) -> Tensor:
        """The labels of the images of these indices, int64 [N] in [0, num_classes - 1]."""
        if self.only is not None:
            return torch.full((len(indices),), self.only)
        return torch.tensor(indices) % self.num_classes

    def words(self) -> str:
        """Which classes these are, to go after what is drawn."""
        if self.only is not None:
            return f", all of class {self.only}"
        return f", of {self.num_classes} classes in turn"

    def in_rows(self, images: Tensor) -> tuple[Tensor, int | None]:
        """The images as a grid shows them: the first row has class 0, and so on.

        Where the number of images is no multiple of the number of classes, the rows of the first classes have one
        image more, and the others end with a black one. One image of each class needs no rows, nor does one class.

        Args:
            images: uint8 [N, C, H, W], the images 0 .. N - 1.

        Returns:
            uint8 [M, C, H, W], and the number of columns; None for a grid that is as square as possible.
        """
        columns = -(-len(images) // self.num_classes)
        if self.only is not None or columns == 1:
            return images, None
        missing = columns * self.num_classes - len(images)
        whole = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return whole.unflatten(0, (columns, self.num_classes)).transpose(0, 1).flatten(0, 1), columns
