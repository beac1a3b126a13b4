"""The programs in deploy/: what they say if something is missing, and the Debian package, made without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import flashd
from tests.documents import ROOT

DEPLOY = ROOT / "deploy"
PYTHON = "3.11"


def run(program: str, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEPLOY / program, *words], capture_output=True, text=True, check=False, env=os.environ | more
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("fetch-wheels", "usage: deploy/fetch-wheels ARCHITECTURE PYTHON\n"),
        ("fetch-wheels aarch64", "usage: deploy/fetch-wheels ARCHITECTURE PYTHON\n"),
        ("fetch-wheels arm64 3.11", "deploy/fetch-wheels: arm64 is not known; there are aarch64 and x86_64\n"),
        ("fetch-wheels aarch64 2.7", "deploy/fetch-wheels: Python 2.7 is not known; there are 3.11, 3.12, 3.13"),
        ("make-deb", "usage: deploy/make-deb ARCHITECTURE PYTHON [WHEELS]\n"),
        ("make-deb riscv64 3.11", "deploy/make-deb: riscv64 is not known; there are aarch64 and x86_64\n"),
        ("make-deb aarch64 3.12", "deploy/make-deb: Python 3.12 is not known; there are 3.11 and 3.13\n"),
        ("image", "usage: sudo deploy/image ARCHITECTURE PYTHON [OPTIONS]\n"),
        ("image arm64 3.11", "deploy/image: arm64 is not known; there are aarch64 and x86_64\n"),
        ("image aarch64 3.12", "deploy/image: Python 3.12 is not known; there are 3.11 and 3.13\n"),
        ("image aarch64 3.11 --kiosk", "deploy/image: --kiosk is not known\nusage: sudo deploy/image"),
        ("image aarch64 3.11 --user", "deploy/image: --user needs a value\n"),
        ("image aarch64 3.11 --user Otto", "deploy/image: --user Otto: small letters, digits, - and _ only, "),
        ("image aarch64 3.11 --user otto", "deploy/image: --user otto needs --password FILE\n"),
        ("image aarch64 3.11 --name my.board", "deploy/image: --name my.board: small letters, digits and - only\n"),
        ("install --kisok", "deploy/install: --kisok is not known\nusage: sudo deploy/install"),
    ],
)
def test_what_is_typed_wrongly_is_refused_with_what_is_right(words: str, says: str) -> None:
    done = run(*words.split())
    assert done.returncode == os.EX_USAGE and done.stdout == "" and done.stderr.startswith(says), done
    assert run(words.split()[0], "--help").returncode == 0 or words.startswith("install")


def test_the_installer_names_all_missing_packages_at_once(tmp_path: Path) -> None:
    """In a PATH with nothing but a few programs, and a Python that has neither venv nor systemd."""
    for name in ("dirname", "tr", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    for name, body in {"id": "echo 0", "python3": "case $3 in *version*) exit 0 ;; esac; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    installer = (DEPLOY / "install").read_text().replace("/usr/lib/python3/dist-packages", str(tmp_path))
    (tmp_path / "install").write_text(installer)
    done = subprocess.run(
        ["/bin/sh", tmp_path / "install", "--kiosk"], capture_output=True, text=True, check=False,
        env={"PATH": str(tmp_path)},
    )  # fmt: skip
    missing = "python3-venv python3-systemd cage chromium polkitd xwayland"
    assert done.stderr == f"deploy/install: packages are missing; install them first: apt install {missing}\n"
    assert done.returncode == os.EX_UNAVAILABLE


def test_who_calls_the_installer_has_no_part_in_it(tmp_path: Path) -> None:
    """In a folder and with an environment that others made: their modules, folders and modes."""
    own, other = tmp_path / "deploy", tmp_path / "other" / "deploy"
    own.mkdir()
    other.mkdir(parents=True)
    shutil.copy(DEPLOY / "install", own)
    for name in ("ensurepip", "sysconfig", "systemd", "venv"):
        for folder in (tmp_path, other):
            (folder / f"{name}.py").write_text("print('theirs', file=__import__('sys').stderr)\n")
    (other / "id").write_text("#!/bin/sh\necho umask $(umask) >&2\necho 0\n")
    (other / "id").chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-x", "deploy/install", "--group", "nobody of this name"], capture_output=True, text=True,
        check=False, cwd=tmp_path, umask=0,
        env={"PATH": f"{other}:{os.environ['PATH']}", "CDPATH": str(other.parent), "PYTHONPATH": str(other)},
    )  # fmt: skip
    assert done.returncode and "deploy/install: " in done.stderr  # it has refused to begin
    assert "umask 0022" in done.stderr and f"+ here={own}\n" in done.stderr
    assert "theirs" not in done.stderr


# --- the Debian package -----------------------------------------------------------------------------------


def wheel(folder: Path, name: str, tag: str, *files: Path) -> None:
    """A wheel of files of this checkout, or of an empty module."""
    project, version = name.split("-")
    with zipfile.ZipFile(folder / f"{name}-{tag}.whl", "w") as packed:
        packed.writestr(f"{project}.py", "") if not files else None
        for file in files:
            packed.write(file, file.relative_to(ROOT))
        about = f"{name}.dist-info"
        packed.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        packed.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        packed.writestr(f"{about}/RECORD", "")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's `control` and its `data`."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb")
    made = tmp_path_factory.mktemp("package")
    wheels = made / "wheels"
    wheels.mkdir()
    sources = [path for room in ("flashd", "device") for path in (ROOT / room).rglob("*.py")]
    wheel(wheels, f"flashd-{flashd.__version__}", "py3-none-any", *sources)
    wheel(wheels, "onnxruntime-1.0", "cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64")
    wheel(wheels, "llguidance-1.0", "cp39-abi3-manylinux_2_31_x86_64")
    done = subprocess.run(
        [DEPLOY / "make-deb", "x86_64", PYTHON, wheels], cwd=made, capture_output=True, text=True, check=False
    )
    deb = made / f"flashd_{flashd.__version__}_amd64.deb"
    assert done.returncode == 0 and done.stdout.startswith(deb.name), done
    assert "has no python3-systemd" in done.stderr
    subprocess.run(["dpkg-deb", "--raw-extract", deb, made / "data"], check=True)
    (made / "data" / "DEBIAN").rename(made / "control")
    return made


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("lintian"), reason="needs lintian")
def test_lintian_finds_no_error_in_it(package: Path) -> None:
    """What the wheels bring is judged apart, in the real package: see tests/README.md."""
    (deb,) = package.glob("*.deb")
    command = ["lintian", "--allow-root", "--fail-on", "error", "--display-level", "error", str(deb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done


def fields(package: Path) -> dict[str, str]:
    lines = (package / "control" / "control").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if not line.startswith(" "))


def test_its_control_data_says_what_it_is_and_needs(package: Path) -> None:
    found = fields(package)
    assert (found["Package"], found["Version"], found["Architecture"]) == ("flashd", flashd.__version__, "amd64")
    needs = found["Depends"].split(", ")
    assert f"python{PYTHON}" in needs and "libc6 (>= 2.31)" in needs  # the newest that a wheel needs
    assert "@" not in (package / "control" / "control").read_text().replace(found["Maintainer"], "")
    assert int(found["Installed-Size"]) > 500
    for script in ("preinst", "postinst", "prerm", "postrm"):
        path = package / "control" / script
        assert path.stat().st_mode & 0o777 == 0o755
        subprocess.run(["sh", "-n", path], check=True)


def test_its_configuration_is_kept_in_an_upgrade(package: Path) -> None:
    names = (package / "control" / "conffiles").read_text().split()
    assert names == [f"/etc/flashd/flashd.{kind}" for kind in ("example.yaml", "schema.json", "yaml")]
    assert all((package / "data" / name.lstrip("/")).is_file() for name in names)


def test_it_has_everything_below_folders_of_packages(package: Path) -> None:
    data = package / "data"
    site = data / f"usr/lib/flashd/lib/python{PYTHON}/site-packages"
    assert {path.name for path in site.glob("*")} >= {"flashd", "device", "onnxruntime.py", "llguidance.py"}
    assert {path.parts[len(data.parts)] for path in data.rglob("*")} == {"usr", "etc"}
    assert (data / "usr/lib/flashd/bin/python").readlink() == Path(f"../../../bin/python{PYTHON}")
    assert (data / "usr/bin/flashd").resolve() == data / "usr/lib/flashd/bin/flashd"
    assert (data / "usr/lib/flashd/bin/flashd").read_text().startswith("#!/usr/lib/flashd/bin/python\n")
    named = [*DEPLOY.glob("*.service"), *DEPLOY.glob("*.socket"), *DEPLOY.glob("*.mount")]
    units = data / "usr/lib/systemd/system"
    assert {path.name for path in units.iterdir()} == {path.name for path in named}
    for unit in units.iterdir():
        text = unit.read_text()
        assert "/opt/" not in text
        assert all(path == "/usr/lib/flashd/bin/flashd" for path in re.findall(r"^Exec.*?(/\S+/flashd) ", text, re.M))
    assert not list(data.rglob("__pycache__")) and not list(data.rglob("direct_url.json"))


def test_an_image_that_enables_all_units_leaves_the_page_off_until_somebody_wants_it(package: Path) -> None:
    presets = (package / "data/usr/lib/systemd/system-preset/50-flashd.preset").read_text()
    (optional,) = re.findall(r"^optional=\"(.*) \$ports\"", (package / "control" / "postinst").read_text(), re.M)
    (ports,) = re.findall(r"^ports='(.*)'", (package / "control" / "postinst").read_text(), re.M)
    assert re.findall(r"^disable (\S+)$", presets, re.M) == [*optional.split(), *ports.split()]


def test_its_sums_are_those_of_its_files(package: Path) -> None:
    done = subprocess.run(
        ["md5sum", "--check", "--quiet", "../control/md5sums"], cwd=package / "data", capture_output=True, check=False
    )
    assert done.returncode == 0, done
    assert len((package / "control" / "md5sums").read_text().splitlines()) > 100


def test_the_installer_and_the_package_start_the_same_units(package: Path) -> None:
    (enabled,) = re.findall(r"systemctl enable --quiet (flashd\.service .*)", (DEPLOY / "install").read_text())
    (packaged,) = re.findall(r"^enabled='(.*)'", (package / "control" / "postinst").read_text(), re.M)
    assert packaged == enabled
