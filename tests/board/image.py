"""What the board is made of: a Debian root file system, a medium with the checkout and its wheels, the card."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flashd.update.manifest import MANIFEST, SIGNATURE
from flashd.update.signature import SecretKey

KEY = SecretKey.new()
"""What the tests' sticks are signed with."""

CHECKOUT = Path(__file__).parents[2]

PYTHON = {"bookworm": "3.11", "trixie": "3.13"}
DEBIAN = {"aarch64": "arm64", "x86_64": "amd64"}

PACKAGES = (
    "systemd-sysv", "udev", "dbus", "initramfs-tools", "zstd", "kmod", "procps", "iproute2", "python3",
    "python3-systemd", "python3-venv",
)  # fmt: skip
"""What there is on Raspberry Pi OS Lite, as far as flashd is concerned; and nothing from a network after this."""

SHELL_UNIT = """\
[Unit]
Description=The test's own way in
StartLimitIntervalSec=0
[Service]
ExecStart=/bin/sh
StandardInput=tty-force
StandardOutput=inherit
StandardError=inherit
TTYPath=/dev/hvc0
SendSIGHUP=yes
Environment=HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
Restart=always
RestartSec=1
[Install]
WantedBy=basic.target
"""

INITRD = """\
#!/bin/sh
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
for module in virtio_pci virtio_blk virtio_console ext4; do force_load "$module"; done
"""


@dataclass(frozen=True)
class Image:
    """Files that QEMU boots from."""

    root: Path
    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class Card:
    """A card that deploy/image made, with firmware (UEFI) that boots from it, in a reader for larger cards."""

    root: Path
    firmware: Path
    size: str  # as qemu-img writes it


def debian(arch: str, suite: str, work: Path) -> Image:
    """A bootable Debian, made once for an architecture and a release."""
    made = work / f"{suite}-{arch}"
    image = Image(made / "root.ext4", made / "vmlinuz", made / "initrd")
    if image.root.exists():
        return image
    made.mkdir(parents=True, exist_ok=True)
    tree, hooks = made / "tree", made / "hooks"
    shutil.rmtree(tree, ignore_errors=True)
    hooks.mkdir(exist_ok=True)
    (hooks / "list").write_text("MODULES=list\n")
    (hooks / "board").write_text(INITRD)
    (hooks / "board-shell.service").write_text(SHELL_UNIT)
    packages = ",".join((*PACKAGES, f"linux-image-{DEBIAN[arch]}"))
    early = f"upload {hooks / 'list'} /etc/initramfs-tools/conf.d/board"
    subprocess.run(
        [
            # its mounts go with the namespace, whatever happens to it
            "unshare", "--mount", "mmdebstrap", "--mode=root", "--variant=minbase",
            f"--arch={DEBIAN[arch]}", f"--include={packages}",
            "--aptopt=Acquire::Languages \"none\"", "--dpkgopt=path-exclude=/usr/share/doc/*",
            '--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/etc/initramfs-tools/hooks"',
            f"--essential-hook={early}",
            f"--essential-hook=upload {hooks / 'board'} /etc/initramfs-tools/hooks/board",
            '--essential-hook=chmod 755 "$1/etc/initramfs-tools/hooks/board"',
            f"--customize-hook=upload {hooks / 'board-shell.service'} /etc/systemd/system/board-shell.service",
            '--customize-hook=chroot "$1" systemctl enable board-shell.service',
            '--customize-hook=chroot "$1" systemctl mask getty@.service serial-getty@.service',
            '--customize-hook=echo board > "$1/etc/hostname"',
            suite, str(tree), "http://deb.debian.org/debian",
        ],
        check=True,
    )  # fmt: skip
    for found, kept in ((tree / "vmlinuz", image.kernel), (tree / "initrd.img", image.initrd)):
        shutil.copy(tree / found.readlink(), kept)
    unfinished = image.root.with_suffix(".unfinished")
    disk(unfinished, tree, "root", more_mib=1500)
    unfinished.rename(image.root)
    shutil.rmtree(tree)
    return image


def medium(arch: str, suite: str, work: Path) -> Path:
    """A disk with this checkout and the wheels beside it, as it is carried to a board without a network."""
    tree, path = _emptied(work / "medium"), work / f"medium-{suite}-{arch}.ext4"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, files):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, tree / name)
    subprocess.run([tree / "deploy/fetch-wheels", arch, PYTHON[suite]], check=True)
    disk(path, tree, "medium", more_mib=16)
    return path


def card(bundle: Path, work: Path) -> Path:
    """The card: a file system labelled FLASHD with the bundle on it."""
    tree, path = _emptied(work / "card-tree"), work / "card.ext4"
    shutil.copy(bundle, tree / "model.flash")
    tree.chmod(0o755)
    (tree / "model.flash").chmod(0o644)
    disk(path, tree, "FLASHD", more_mib=16)
    return path


def stick(configuration: str, work: Path) -> Path:
    """A USB stick that brings a configuration."""
    tree, path = _emptied(work / "stick-tree"), work / "stick.ext4"
    (tree / "flashd.yaml").write_text(configuration)
    sha256 = hashlib.sha256(configuration.encode()).hexdigest()
    (tree / MANIFEST).write_text(f"needs: '0.1'\nconfiguration: {{file: flashd.yaml, sha256: '{sha256}'}}\n")
    (tree / SIGNATURE).write_text(KEY.sign((tree / MANIFEST).read_bytes(), "a stick of the tests"))
    disk(path, tree, "STICK", more_mib=8)
    return path


def _emptied(tree: Path) -> Path:
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    return tree


def disk(path: Path, tree: Path, label: str, more_mib: int) -> None:
    """An ext4 file system with a tree's files and room for more."""
    used = subprocess.run(["du", "-sm", str(tree)], capture_output=True, text=True, check=True).stdout.split()[0]
    path.unlink(missing_ok=True)
    mib = int(used) * 11 // 10 + more_mib
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-L", label, "-d", str(tree), str(path), f"{mib}M"], check=True)
