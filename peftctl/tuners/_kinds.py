"""The modules that a bottleneck adapter may be, by the name that its configuration is saved with."""

from __future__ import annotations

from torch import nn

from peftctl.tuners.perceptrons import Perceptron

KINDS: dict[str, type[nn.Module]] = {
    "plain": Perceptron,
}
"""Kind -> a module made of (d, config), whose forward turns h of (..., d) into the change, of the same shape."""
