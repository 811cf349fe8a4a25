"""The statements of pyproject.toml: packages, data files, licences, dependencies and version."""

import ast
import sys
import tomllib
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

import mla_convert

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {name: ROOT / SETUPTOOLS["package-dir"].get(name, name.replace(".", "/")) for name in SETUPTOOLS["packages"]}


def test_every_package_is_listed():
    tops = {name: folder for name, folder in FOLDERS.items() if "." not in name}
    found = {".".join((name, *init.parent.relative_to(folder).parts))
             for name, folder in tops.items() for init in folder.rglob("__init__.py")}  # fmt: skip
    assert found == FOLDERS.keys()
    on_disk = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    on_disk |= {path.parent.name for path in ROOT.glob("kernels/torch-ext/*/__init__.py")}
    assert on_disk == {folder.name for folder in tops.values()}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_data_file_is_in_the_wheel(name):
    patterns = ["*.py", *SETUPTOOLS["package-data"].get(name, [])]
    inner = {folder for folder in FOLDERS.values() if folder != FOLDERS[name]}
    for path in FOLDERS[name].rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and not inner & set(path.parents):
            assert any(fnmatch(str(path.relative_to(FOLDERS[name])), pattern) for pattern in patterns), path


def test_licence_files_are_there():
    for file in PROJECT["project"]["license-files"]:
        assert (ROOT / file).is_file()


def test_every_import_is_a_declared_dependency():
    extras = PROJECT["project"]["optional-dependencies"]
    requirements = [*PROJECT["project"]["dependencies"], *extras["eval"], *extras["heal"], *extras["humaneval"]]
    declared = {requirement.split(">=")[0].lower().replace("-", "_") for requirement in requirements}
    imported = set()
    for name in FOLDERS:
        for file in FOLDERS[name].glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.partition(".")[0])
                elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                    named = node.args[0]
                    if isinstance(named, ast.Constant) and not named.value.startswith("."):
                        imported.add(named.value.partition(".")[0])
    imported -= {*sys.stdlib_module_names, *(name.partition(".")[0] for name in FOLDERS)}
    imported -= {"triton"}  # torch depends on it if there are GPUs; it is imported only to launch a kernel
    imported -= {
        "vllm",
        "sglang",
        "sgl_kernel",
    }  # imported by ask_engine.py and the plugins, which run in the engine's environment
    distributions = metadata.packages_distributions()
    # an extra that is not installed has the name that it is imported by
    needed = {distributions.get(module, [module])[0].lower().replace("-", "_") for module in imported}
    assert needed <= declared


def test_version_and_public_names(cli):
    assert mla_convert.__version__ == metadata.version("mla_convert")
    for name in mla_convert.__all__:
        assert getattr(mla_convert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mla_convert.nothing
    code, out, err = cli("--version")
    assert code == 0 and mla_convert.__version__ in out and not err
