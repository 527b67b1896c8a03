"""Packages for setuptools; everything else is in pyproject.toml, which cannot combine the two.

Rooms are found by themselves, and `configs/` is installed inside the package.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gptcli", "gptcli.*"]), "gptcli.shipped"],
    package_dir={"gptcli.shipped": "configs"},
)
