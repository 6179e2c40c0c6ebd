"""The modules that a bottleneck adapter may be, by the name that its configuration is saved with."""

from __future__ import annotations

from torch import nn

from peftctl.tuners.expert_adapters import ExpertPerceptron
from peftctl.tuners.fused_perceptrons import FusedPerceptrons
from peftctl.tuners.perceptrons import Perceptron
from peftctl.tuners.sparse_adapters import SparsePerceptron

KINDS: dict[str, type[nn.Module]] = {
    "plain": Perceptron,
    "experts": ExpertPerceptron,
    "sparse": SparsePerceptron,
    "fusion": FusedPerceptrons,
}
"""Kind -> a module made of (d, config), whose forward turns h of (..., d) into the change, of the same shape."""
