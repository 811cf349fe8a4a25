"""Kernels run in Triton's interpreter; without Triton, the tests that need it are skipped."""

import sys
from pathlib import Path

import pytest

for folder in (Path(__file__).parents[2] / "kernels" / "torch-ext", Path(__file__).parent):
    sys.path.insert(0, str(folder))


def let_numpy_index(interpreter) -> None:
    """Make Triton 3.6's interpreter work with NumPy 2.4, which refuses int() of an array with one number."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@pytest.fixture(scope="session")
def triton():
    """The triton module, in interpreter mode."""
    module = pytest.importorskip("triton", reason="Triton is not installed: the kernels cannot be interpreted")
    from triton.runtime import interpreter

    let_numpy_index(interpreter)
    return module
