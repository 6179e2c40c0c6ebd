"""Compare every method's layers with an independent float64 computation of its paper's equations.

    python -m scripts.parity [NAME ...]        (or: python scripts/parity [NAME ...])

One line a method: its source, the seed of its numbers, the largest relative difference of the outputs and of the
gradients. Exits with 1 where one is above the fixture's tolerance. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # as a path, this folder comes first: its names are methods'
    del sys.path[0]
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts import parity


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.parity", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(parity.names())}; left out, all")
    names = parser.parse_args().names or parity.names()
    if unknown := sorted(set(names) - set(parity.names())):
        parser.error(f"no fixture for {', '.join(unknown)}; there are {', '.join(parity.names())}")
    warnings.simplefilter("ignore")
    differing = [name for name in names if not report(name)]
    if differing:
        sys.exit(f"differing: {', '.join(differing)}")


def report(name: str) -> bool:
    """Print a method's line; return whether both sides are equal."""
    fixture = parity.load(name).FIXTURE
    found = parity.compared(name)
    verdict = "equal" if found.equal else f"DIFFERS in {', '.join(found.names[:4])}"
    allowed = f"; up to {fixture.tolerance:.0e}: {fixture.reason}" if fixture.reason else ""
    print(
        f"{name:16} seed {fixture.seed}  outputs {found.outputs:8.1e}  gradients {found.gradients:8.1e}  {verdict}"
        f"  [{fixture.source}{allowed}]",
        flush=True,
    )
    return found.equal


if __name__ == "__main__":
    main()
