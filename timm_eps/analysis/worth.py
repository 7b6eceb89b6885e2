"""The records of an analysis: one a branch, and one a step of the curve."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Branch", "Step"]


@dataclass(frozen=True)
class Branch:
    """What one residual branch is worth and costs, with all the others in place.

    Attributes:
        slot: Slot path.
        rise: What the mean loss of an image rises by without the branch. NaN or infinite if the loss is.
        response: Largest ``|F|`` over the images, in activation units.
        parameters: Number of parameters that go with the branch.
        macs: Multiply-adds of an image that go with it.
        milliseconds: Time of a forward pass that goes with it, by batch size.
    """

    slot: str
    rise: float
    response: float
    parameters: int
    macs: int
    milliseconds: dict[int, float]


@dataclass(frozen=True)
class Step:
    """What is left after one more branch was closed, and those before it.

    Attributes:
        slots: The branch, and those inside of it; none in the first step, the dense network.
        loss: Mean loss of an image.
        accuracy: Fraction of the images that are classified correctly.
        branches: Number of residual branches.
        parameters: Number of parameters.
        macs: Multiply-adds of an image.
        milliseconds: Time of a forward pass by batch size, predicted from that of the branches.
    """

    slots: list[str]
    loss: float
    accuracy: float
    branches: int
    parameters: int
    macs: int
    milliseconds: dict[int, float]
