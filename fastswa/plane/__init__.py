"""Planes of weight space: loss and error around trained weights, as in the paper's figures."""

from __future__ import annotations

from fastswa.plane.drawing import plot
from fastswa.plane.grid import PlaneGrid
from fastswa.plane.weight_plane import Coordinates, WeightPlane

__all__ = ["Coordinates", "PlaneGrid", "WeightPlane", "plot"]
