"""Layers that adapters are made of. Importing it makes peft know the types of adapters that are ours."""

from peftctl.tuners._register import register_types

register_types()
