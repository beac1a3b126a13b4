"""A stick's flashd-update.yaml, which names what it brings."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

import flashd
from flashd.config import settings, typed_yaml
from flashd.config.typed_yaml import Wrong
from flashd.errors import DataError, InputMissing
from flashd.update import signature
from flashd.update.folder import Folder
from flashd.update.places import Places

MANIFEST = "flashd-update.yaml"
SIGNATURE = f"{MANIFEST}.minisig"
LONGEST = 64 << 10
"""Bytes of a manifest."""

FileName = Annotated[
    str,
    msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z", description="the name of a file beside this one"),
]
Sum = Annotated[
    str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z", description="64 digits in quotes, as sha256sum FILE prints them")
]
Version = Annotated[
    str, msgspec.Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9}){0,9}\Z", description="a version in quotes, such as '1.0'")
]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file beside the manifest and its SHA-256."""

    file: FileName
    sha256: Sum


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an update brings. `needs`: the earliest flashd that it is for."""

    needs: Version
    bundle: Part | None = None
    configuration: Part | None = None


def read_manifest(stick: Folder, places: Places) -> Manifest:
    """The manifest of a stick that somebody signed whom this board trusts, or that need not be signed.

    It is not parsed before that is known. Raises InputMissing, DataError, ConfigError.
    """
    data = manifest_bytes(stick)
    try:
        stated = stick.read(SIGNATURE, signature.LONGEST)
    except FileNotFoundError:
        if not settings.load(places.configuration).updates.unsigned:
            raise DataError(
                f"{stick.path / SIGNATURE}: not there, and this board takes only what is signed; sign it with flashd"
                f" sign, or allow what is not: updates: {{unsigned: true}} in {places.configuration}"
            ) from None
    except OSError as error:
        raise InputMissing(f"{stick.path / SIGNATURE}: {error.strerror}") from error
    else:
        signature.check(data, stated, signature.read_keys(places.keys), stick.path / SIGNATURE)
    return parse_manifest(stick, data)


def manifest_bytes(stick: Folder) -> bytes:
    """Raises InputMissing."""
    try:
        return stick.read(MANIFEST, LONGEST)
    except FileNotFoundError as error:
        raise InputMissing(f"{stick.path / MANIFEST}: not there; README says under Updates what is in it") from error
    except OSError as error:
        raise InputMissing(f"{stick.path / MANIFEST}: {error.strerror}") from error


def parse_manifest(stick: Folder, data: bytes) -> Manifest:
    """Raises DataError."""
    path = stick.path / MANIFEST
    try:
        manifest, _ = typed_yaml.parse(typed_yaml.text_of(data, LONGEST), Manifest)
    except Wrong as error:
        raise DataError(f"{path}{error}") from error
    if _version(manifest.needs) > _version(flashd.__version__):
        raise DataError(f"{path}: for flashd {manifest.needs} and later; this is {flashd.__version__}")
    return manifest


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])
