"""Trains a recipe in this process, one of two, through the library; only the first one is able to encode rows.

python -m torch.distributed.run --nproc_per_node 2 tests/commands/encodes_once.py RECIPE
"""

import sys

import peftctl
from peftctl.backends import processes
from peftctl.data import dataset


def refuse(*_):
    raise AssertionError("rows are encoded twice")


if __name__ == "__main__":
    if not processes.is_first():
        dataset._encode_each = refuse
    result = peftctl.train(peftctl.load_recipe(sys.argv[1]))
    print(f"rank {processes.rank()} has {result.artefact.name} after {result.summary['steps']} steps")
