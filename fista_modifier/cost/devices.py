"""The time that devices take to prune a model."""

from __future__ import annotations

from dataclasses import dataclass

from fista_modifier.cost.operations import Cost
from fista_modifier.cost.shape import LayerShape
from fista_modifier.pruning.corrected import CorrectedProcedure

__all__ = ["DEVICES", "Device", "seconds"]


@dataclass(frozen=True)
class Device:
    """
    A kind of device that prunes.

    :param memory: bytes of its memory
    :param half: operations a second in bfloat16, for runs of a layer
    :param tensor: operations a second in TensorFloat-32, for sums of 16-bit values and
        searches
    :param single: operations a second in float32, for what must be exact
    """

    memory: float
    half: float
    tensor: float
    single: float


# Half of the published peaks (A100 and H100 SXM, dense) is taken as reached.
DEVICES = {
    "a100-40gb": Device(40e9, 0.5 * 312e12, 0.5 * 156e12, 0.5 * 19.5e12),
    "a100-80gb": Device(80e9, 0.5 * 312e12, 0.5 * 156e12, 0.5 * 19.5e12),
    "h100-80gb": Device(80e9, 0.5 * 989e12, 0.5 * 494e12, 0.5 * 67e12),
}


def seconds(
    cost: Cost,
    shape: LayerShape,
    procedure: CorrectedProcedure,
    device: Device,
    devices: int = 1,
) -> float:
    """
    Predict the time of a run from its matrix products and factorisations.

    :param cost: the operations for one layer
    :param shape: the shape of the model's layers
    :param procedure: what is done to a layer
    :param device: the kind of device that prunes
    :param devices: number of such devices; each has layers of its own or, where layers
        depend on one another, data of its own in all but the reconstruction
    :return: predicted seconds for all layers, whose weights have 16 bits
    """
    shared = (cost.recording + cost.replays) / device.half
    shared += (cost.gram + cost.search) / device.tensor
    shared += (cost.drift + cost.refits) / device.single
    training = cost.reconstruction / device.half
    if procedure.chains_layers:
        return shape.layers * (shared / devices + training)
    return -(-shape.layers // devices) * (shared + training)
