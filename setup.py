"""Drives CMakeLists.txt through tools/native.py; where that cannot be, the package is pure."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

import native


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # No interpreter's suffix: the library knows no Python.
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        native.build(Path(self.get_ext_fullpath(ext.name)).resolve().parent)


class CleanBuild(build):
    def run(self) -> None:
        # A library left by an earlier build must not slip into a pure wheel.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fusednorm._C", sources=[])] if native.obstacle() is None else [],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
