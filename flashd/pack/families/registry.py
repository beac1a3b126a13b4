"""Finds the family of a model. Every module of the folders beside this one that has FAMILIES is found by itself."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

from flashd.errors import DataError
from flashd.pack import families
from flashd.pack.families.family import EXPERTS, JOINED_EXPERTS, Family, Folder, Mixture
from flashd.pack.families.halves import Joined
from flashd.pack.families.tensors import TURNED, beyond, lacking
from flashd.pack.open_model import OpenModel


def _found() -> Iterator[Family]:
    for folder in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        if folder.ispkg:
            for module in pkgutil.iter_modules(import_module(folder.name).__path__, f"{folder.name}."):
                yield from import_module(module.name).FAMILIES


FAMILIES: dict[str, Family] = {family.architecture: family for family in _found()}
"""By GGUF's name of the architecture."""

FOLDERS: dict[str, tuple[str, Folder]] = {
    folder.model_type: (family.architecture, folder) for family in FAMILIES.values() for folder in family.folders
}
"""By the `model_type` of a folder: the architecture in GGUF, and how the folder is read."""

SEEING: dict[str, str] = {
    seeing: folder.model_type for family in FAMILIES.values() for folder in family.folders for seeing in folder.seeing
}
"""By the `model_type` of a model that also sees: that of the part that speaks."""


def arranged(model: OpenModel) -> OpenModel:
    """A model with layers as a bundle has them. Raises DataError if its file's make none."""
    family = FAMILIES.get(model.architecture)
    return Joined(model) if family and family.halves else model


def family_of(model: OpenModel) -> Family:
    """The family of a model. Raises DataError naming all that is not supported."""
    family = FAMILIES.get(model.architecture)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        more = beyond(model, replace(FAMILIES["llama"], mixture=None))
        raise DataError(
            f"{model.path}: architecture {model.architecture!r} is not supported; known are {known}"
            + (f". What a Llama does not have: {more}" if more else "")
        )
    if family.variant and family.variant[0] in model.names:
        family = family.variant[1]
    if family.may_turn and model.metadata(f"{family.architecture}.{TURNED}") is False:
        family = replace(family, rotary=False)
    lacks = []
    if model.number("expert_count", int, 0):
        if family.mixture is None:
            lacks.append(f"a mixture of experts is not supported for {model.architecture!r} yet")
            family = replace(family, mixture=Mixture())
        names = {**EXPERTS, **family.names}
        family = replace(family, names=names, norms=(*family.norms, *(family.mixture or Mixture()).norms))
        if any(JOINED_EXPERTS in name for name in model.names):
            family = replace(family, names={**names, "inputs": JOINED_EXPERTS}, joined_experts=True)
    else:
        family = replace(family, mixture=None)
    if lacks := [*lacks, *lacking(model, family)]:
        raise DataError(f"{model.path}: {'; '.join(lacks)}")
    return family
