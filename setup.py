"""Puts recipes/ and configs/ into wheels as peftctl/_data/; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    """Copies the data folders beside the modules; an editable install reads the clone's own folders."""

    def run(self) -> None:
        """Build the modules, then the data, without what an earlier build may have left."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "peftctl" / "_data"
        shutil.rmtree(target, ignore_errors=True)
        for folder in ("recipes", "configs"):
            shutil.copytree(folder, target / folder)


setup(cmdclass={"build_py": BuildWithData})
