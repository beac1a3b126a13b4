"""Signatures as minisign makes them: who has a secret key signs a file, and a board that has the public one knows.

The formats are those of https://jedisct1.github.io/minisign/, so either program checks what the other has signed. A
secret key that we make has no password, as with `minisign -G -W`; whoever may read the file can sign with it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flashd.errors import ConfigError, DataError, InputMissing
from flashd.update.folder import Folder

LONGEST = 4 << 10
"""Bytes of a key or a signature."""

UNTRUSTED, TRUSTED = "untrusted comment: ", "trusted comment: "
PLAIN, HASHED = b"Ed", b"ED"
"""What is signed: the file itself, as minisign did before version 0.8, or its BLAKE2b sum."""

PUBLIC = struct.Struct("<2s 8s 32s")
"""PLAIN, number of the key, the key."""

SIGNED = struct.Struct("<2s 8s 64s")
"""PLAIN or HASHED, number of the key, signature."""

SECRET = struct.Struct("<2s 2s 2s 32s Q Q 8s 32s 32s 32s")
"""PLAIN, kind of password, B2, salt and cost of the password, number of the key, secret and public key, a sum. The
sum and what belongs to the password are zero if there is none."""


@dataclass(frozen=True)
class SecretKey:
    """What signs."""

    number: bytes
    seed: bytes

    @classmethod
    def new(cls) -> SecretKey:
        return cls(os.urandom(8), os.urandom(32))

    @property
    def name(self) -> str:
        return _name(self.number)

    @property
    def _public(self) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()

    def sign(self, data: bytes, comment: str) -> str:
        """The signature file of `data`; the comment is a line that is signed as well."""
        key = Ed25519PrivateKey.from_private_bytes(self.seed)
        signature = key.sign(hashlib.blake2b(data).digest())
        both = key.sign(signature + comment.encode())
        first = _line(f"signature of flashd key {self.name}", SIGNED.pack(HASHED, self.number, signature))
        return f"{first}{TRUSTED}{comment}\n{base64.b64encode(both).decode()}\n"

    def public_text(self) -> str:
        """The file of the public key."""
        return _line(f"flashd public key {self.name}", PUBLIC.pack(PLAIN, self.number, self._public))

    def text(self) -> str:
        """The file of the secret key."""
        return _line(
            f"flashd secret key {self.name}",
            SECRET.pack(PLAIN, b"", b"B2", b"", 0, 0, self.number, self.seed, self._public, b""),
        )

    @classmethod
    def parse(cls, data: bytes, path: Path) -> SecretKey:
        """Raises DataError."""
        fields = SECRET.unpack(_decoded(data, SECRET.size, path, "secret key"))
        kind, password, *_, number, seed, public, _ = fields
        if password != b"\0\0":
            raise DataError(f"{path}: has a password; sign with minisign itself, or use a key that has none")
        key = cls(number, seed)
        if (kind, public) != (PLAIN, key._public):
            raise DataError(f"{path}: damaged, or a secret key of another kind than minisign's")
        return key


def read_keys(folder: Path) -> dict[bytes, bytes]:
    """The public keys of a folder by their numbers. Raises ConfigError for a file in it that is not a key."""
    try:
        with Folder.at(folder) as keys:
            names = sorted(os.listdir(keys.fd))  # noqa: PTH208 (a descriptor)
            found = {name: keys.read(name, LONGEST) for name in names if not name.startswith(".")}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; keep there only public keys, a file each") from error
    out = {}
    for name, data in found.items():
        try:
            kind, number, key = PUBLIC.unpack(_decoded(data, PUBLIC.size, folder / name, "public key"))
        except DataError as error:
            raise ConfigError(str(error)) from error
        if kind != PLAIN:
            raise ConfigError(f"{folder / name}: not a public key of minisign's kind")
        out[number] = key
    return out


def check(data: bytes, signature: bytes, keys: dict[bytes, bytes], path: Path) -> None:
    """Raises DataError unless the owner of one of the keys has signed `data`.

    Args:
        data: the file.
        signature: the file of its signature.
        keys: those that are trusted, as `read_keys` gives them.
        path: the signature's, for messages.
    """
    lines = signature[: LONGEST + 1].split(b"\n")
    if len(signature) > LONGEST or len(lines) < 4 or not lines[2].startswith(TRUSTED.encode()):
        raise DataError(f"{path}: not a signature as flashd sign and minisign make them")
    kind, number, stated = SIGNED.unpack(_decoded(b"\n".join(lines[:2]), SIGNED.size, path, "signature"))
    comment, both = lines[2].removeprefix(TRUSTED.encode()), _base64(lines[3], path, "signature")
    if number not in keys:
        raise DataError(f"{path}: signed with the key {_name(number)}, which this board does not know")
    if kind not in (PLAIN, HASHED):
        raise DataError(f"{path}: a signature of an unknown kind")
    try:
        key = Ed25519PublicKey.from_public_bytes(keys[number])
        key.verify(stated, hashlib.blake2b(data).digest() if kind == HASHED else data)
        key.verify(both, stated + comment)
    except (InvalidSignature, ValueError) as error:
        raise DataError(f"{path}: wrong: the files are not those that were signed, or were changed later") from error


def read_secret_key(path: Path) -> SecretKey:
    """Raises InputMissing, DataError."""
    try:
        with path.open("rb") as file:
            return SecretKey.parse(file.read(LONGEST + 1), path)
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}; flashd sign --new-key makes one") from error


def _name(number: bytes) -> str:
    """A key's number as minisign prints it."""
    return f"{int.from_bytes(number, 'little'):016X}"


def _line(comment: str, data: bytes) -> str:
    return f"{UNTRUSTED}{comment}\n{base64.b64encode(data).decode()}\n"


def _decoded(data: bytes, size: int, path: Path, what: str) -> bytes:
    """What the second line of a file of minisign's says. Raises DataError."""
    lines = data.split(b"\n")
    if len(lines) < 2 or not lines[0].startswith(UNTRUSTED.encode()):
        raise DataError(f"{path}: not a {what} as flashd sign and minisign make them")
    decoded = _base64(lines[1], path, what)
    if len(decoded) != size:
        raise DataError(f"{path}: not a {what} as flashd sign and minisign make them")
    return decoded


def _base64(line: bytes, path: Path, what: str) -> bytes:
    try:
        return base64.b64decode(line.rstrip(b"\r"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{path}: not a {what} as flashd sign and minisign make them") from error
