"""Production without model code: an environment of the wheel and its `cpu` extra draws the same bytes as the one that built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "peft", "openvino", "nncf", "accelerate", "pydantic")
PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment that holds the project's wheel with the extra `cpu`, and nothing else."""
    folder = tmp_path_factory.mktemp("production")
    pip(["wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    (wheel,) = folder.glob("mc_runtime-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    pip(["--python", str(python), "install", "--constraint", str(ROOT / "constraints.txt"), f"{wheel}[cpu]"])
    return python.parent


@pytest.fixture(scope="module", params=["metacanvas", "stock"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny checkpoint, built here."""
    from tests.factories import tiny_metacanvas_checkpoint, tiny_stock_sana

    folder = tmp_path_factory.mktemp(request.param)
    make = tiny_stock_sana if request.param == "stock" else tiny_metacanvas_checkpoint
    checkpoint = make(folder / "checkpoint")
    run(Path(sys.executable).parent, "build", checkpoint, "-o", folder / "bundle", cwd=folder)
    return folder / "bundle"


def test_what_is_and_what_is_not_there(production: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, mc_runtime, mc_export, mc_kernels; "
        f"print([name for name in {ABSENT!r} if u.find_spec(name)], mc_runtime.__file__)"
    )
    out = subprocess.run([production / "python", "-c", code], cwd=tmp_path, env=clean(), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found, where = out.stdout.split("] ")
    assert found == "["
    assert where.startswith(str(production.parent))


def test_the_same_bytes_as_where_it_was_built(production: Path, bundle: Path, tmp_path: Path) -> None:
    arguments = ["generate", bundle, PROMPT, "--seed", "3", "--steps", "4", "--threads", "1", "-o", "out.png"]
    if not json.loads((bundle / "manifest.json").read_text())["stock"]:
        arguments += ["--canvas-map", "map.png"]
    for place, where in (("here", Path(sys.executable).parent), ("there", production)):
        (tmp_path / place).mkdir()
        run(where, *arguments, cwd=tmp_path / place)
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert "out.png" in names
    assert names == sorted(path.name for path in (tmp_path / "there").iterdir())
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


def test_the_api(production: Path, bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mc_runtime import Runtime\n"
        f"runtime = Runtime.load({str(bundle)!r})\nplan = runtime.plan({PROMPT!r})\n"
        "images = runtime.render(plan, seed=1, num_images=2, steps=2).images\nassert len(images) == 2\n"
        f"assert not set({ABSENT!r}) & set(sys.modules)"
    )
    done = subprocess.run([production / "python", "-c", code], cwd=tmp_path, env=clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_needs_the_build_half_says_what_to_install(production: Path, tmp_path: Path) -> None:
    done = run(production, "build", "checkpoint", "-o", "bundle", cwd=tmp_path, expect=4)
    assert "mc-runtime[build]" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_doctor(production: Path, tmp_path: Path) -> None:
    report = json.loads(run(production, "doctor", "--json", cwd=tmp_path).stdout)
    assert report["targets"]["onnxruntime"]["ready"]
    assert not report["targets"]["openvino"]["ready"]
    assert "mc-runtime[openvino]" in report["targets"]["openvino"]["mend"]
    assert "torch" in report["build"]["missing"]
    assert not any(demo["shipped"] for demo in report["demos"].values())


def run(where: Path, *arguments: object, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """`mc-runtime` of the environment whose `bin` is `where`."""
    line = [str(where / "mc-runtime"), *map(str, arguments)]
    if not Path(line[0]).exists():  # the project is on the path and not installed
        line = [str(where / "python"), "-m", "mc_runtime.cli.main", *line[1:]]
    env = clean() if where != Path(sys.executable).parent else os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


def clean() -> dict[str, str]:
    """The environment without what would let another interpreter see this one's packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def pip(arguments: list[str]) -> None:
    """Run this environment's pip; its output is shown only if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
