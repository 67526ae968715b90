"""torchvision and timm, importable beside a torch their binary was not built for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch


@functools.cache
def torchvision() -> ModuleType:
    """torchvision; on a CPU build of torch its operators are declared first, never defined.

    Its library does not load there, and importing it then fails on the fakes it registers for
    operators nobody has declared. Models use none of them.
    """
    if torch.version.cuda is None:
        root = Path(importlib.util.find_spec("torchvision").origin).parent
        source = (root / "_meta_registrations.py").read_text()
        found = re.findall(r'register_meta\("(\w+)"|register_fake\("torchvision::(\w+)"', source)
        library = torch.library.Library("torchvision", "DEF")
        for name in {a or b for a, b in found}:
            library.define(f"{name}(Tensor x) -> Tensor")
        _KEEP.append(library)
    return importlib.import_module("torchvision")


@functools.cache
def timm() -> ModuleType:
    torchvision()
    return importlib.import_module("timm")


_KEEP: list[torch.library.Library] = []
