"""The wheel, the source distribution and the editable install: what they hold, and that they predict offline."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qmprop import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WEIGHTS = "weights/egnn-qm9.safetensors"
#: Makes every attempt to reach a network an error, for all Python code of an environment.
NO_NETWORK = """
import sys
def _refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        raise RuntimeError(f"no network: {event}")
sys.addaudithook(_refuse)
"""


def run(*command, cwd, **variables):
    drop = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind, source, folder):
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder, cwd=source)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def environment(tmp_path):
    """The Python of a new environment with this one's packages, but without its qmprop and without a network."""
    folder = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    borrowed = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    (packages / "no_network.py").write_text(NO_NETWORK)
    (packages / "no_network.pth").write_text("import no_network\n")
    return python


def install(python, *arguments):
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--ignore-installed", "--no-build-isolation", *arguments, cwd=python.parent)


def offline():
    """Return a prefix that starts a command without network devices, where the system lets us."""
    for prefix in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    return []


def predict_from_nowhere(python, tmp_path):
    """Predict in a folder with nothing but a molecule; return where the package lies and the record."""
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "examples" / "benzamide.xyz", folder)
    command = python.parent / "qmprop"
    output = run(*offline(), command, "predict", "benzamide.xyz", "-f", "jsonl", cwd=folder, HOME=str(folder))
    where = run(python, "-c", "import qmprop; print(qmprop.__file__)", cwd=folder).strip()
    assert [path.name for path in folder.iterdir()] == ["benzamide.xyz"]
    return Path(where).parent, json.loads(output)


def test_the_wheel_holds_the_package_and_its_weights_and_no_more(wheel):
    assert wheel.name == f"qmprop-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"qmprop/{path.name}" for path in (ROOT / "qmprop").glob("*.py")}
    assert modules | {
        f"qmprop/{WEIGHTS}",
        "qmprop/weights/README.md",
        "qmprop/py.typed",
        "qmprop/report.html.j2",
    } <= set(names)
    assert {name.split("/")[0] for name in names} == {"qmprop", f"qmprop-{__version__}.dist-info"}
    assert [name for name in names if "test" in Path(name).name and not name.endswith(".json")] == []
    assert zipfile.ZipFile(wheel).read(f"qmprop/{WEIGHTS}") == (ROOT / WEIGHTS).read_bytes()


def test_the_wheel_says_what_the_package_is(wheel):
    metadata = zipfile.ZipFile(wheel).read(f"qmprop-{__version__}.dist-info/METADATA").decode()
    assert "License-Expression: MIT" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[2] in metadata


def test_the_wheel_predicts_from_an_empty_folder_with_the_network_off(wheel, environment, tmp_path):
    install(environment, wheel)
    package, record = predict_from_nowhere(environment, tmp_path)
    assert package.is_relative_to(tmp_path)
    assert record["status"] == "ok"
    assert record["properties"]["u0"]["value"] == pytest.approx(-10908, abs=2)


def test_the_editable_install_predicts_from_an_empty_folder_with_the_network_off(environment, tmp_path):
    install(environment, "--editable", ROOT)
    package, record = predict_from_nowhere(environment, tmp_path)
    assert package == ROOT / "qmprop"
    assert record["status"] == "ok"


def test_the_network_is_off_in_these_tests(environment, tmp_path):
    code = "import socket\ntry: socket.create_connection(('127.0.0.1', 9))\nexcept RuntimeError as e: print(e)"
    assert run(environment, "-c", code, cwd=tmp_path).startswith("no network")


def test_the_source_distribution_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"qmprop-{__version__}"
    for name in (WEIGHTS, "README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "examples/water.xyz"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert (source / "tests" / "test_packaging.py").exists()
    again = build("wheel", source, tmp_path / "again")
    old, new = (zipfile.ZipFile(path) for path in (wheel, again))
    assert {item.filename: item.CRC for item in new.infolist()} == {item.filename: item.CRC for item in old.infolist()}


# --- constraints.txt --------------------------------------------------------------------------------------------------


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def needed():
    """Return the names of the installed packages that qmprop with its extras needs, directly or not."""
    names = set()
    queue = [Requirement(text) for text in PROJECT["dependencies"]]
    queue += [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in names or name == "qmprop":
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        names.add(name)
        for text in found.requires or ():
            child = Requirement(text)
            if child.marker is None or any(
                child.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            ):
                queue.append(child)
    return names


def test_constraints_pin_exact_versions_in_order():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins())
    names = [line.split("==")[0].lower() for line in pins()]
    assert names == sorted(set(names))
    assert "torch==2.13.0" in pins()


def test_constraints_pin_everything_the_project_needs():
    pinned = {canonicalize_name(line.split("==")[0]) for line in pins()}
    exempt = {"pip", "setuptools", "triton"}  # triton and CUDA's libraries belong to PyTorch's CUDA build
    assert {name for name in needed() - pinned - exempt if not name.startswith(("nvidia-", "cuda-"))} == set()


def test_the_ranges_of_the_dependencies_allow_the_pinned_versions():
    versions = {canonicalize_name(name): version for name, version in (line.split("==") for line in pins())}
    texts = [*PROJECT["dependencies"], *(text for part in PROJECT["optional-dependencies"].values() for text in part)]
    for requirement in map(Requirement, texts):
        if requirement.name != "qmprop":
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)
