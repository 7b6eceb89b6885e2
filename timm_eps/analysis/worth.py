"""The records of an analysis: one for each branch, and one for each step of the curve."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Branch", "Step"]


@dataclass(frozen=True)
class Branch:
    """Value and cost of one residual branch, with all the others in place.

    Attributes:
        slot: Slot path.
        rise: Rise of the mean loss without the branch. NaN or infinite if the loss is.
        response: Largest ``|F|`` over the images, in activation units.
        parameters: Number of parameters saved without the branch.
        macs: Multiply-adds per image saved without the branch.
        milliseconds: Time of a forward pass saved without the branch, by batch size.
    """

    slot: str
    rise: float
    response: float
    parameters: int
    macs: int
    milliseconds: dict[int, float]


@dataclass(frozen=True)
class Step:
    """The remaining network after closing one more branch.

    Attributes:
        slots: Closed branch and the branches inside it; empty in the first step, the dense network.
        loss: Mean loss per image.
        accuracy: Fraction of correctly classified images.
        branches: Number of residual branches.
        parameters: Number of parameters.
        macs: Multiply-adds per image.
        milliseconds: Time of a forward pass by batch size, predicted from the times of the branches.
    """

    slots: list[str]
    loss: float
    accuracy: float
    branches: int
    parameters: int
    macs: int
    milliseconds: dict[int, float]
