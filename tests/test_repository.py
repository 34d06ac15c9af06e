"""The repository as a whole: linters, the shape of the files that travel to the Hub, and what README promises."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import mlinter
import pytest
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.dynamic_module_utils import get_imports, get_relative_imports


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_emu"
TRAVELLING_FILES = sorted(PACKAGE.glob("*_emu*.py"))

# mlinter's TRF057 asks for generated docstrings; ours are written out, so that a reader of the file sees them.
MLINTER_RULES = mlinter.DEFAULT_ENABLED_TRF_RULES - {"TRF057"}

# A home or mount of one machine, or where one machine gets its packages from.
MACHINE = re.compile(r"(?<![\w.$}])/(?:home|root|opt|work|Users|mnt)/\w|file:/{3}|(?:index|find)[-_](?:url|links)")

# A user chooses them by `report_to`, and has them installed: imported where they are used, and no requirement of ours.
TRACKERS = {"trackio", "wandb"}


def run_tool(*arguments: str) -> None:
    result = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def travelling(parametrised):
    return pytest.mark.parametrize("path", TRAVELLING_FILES, ids=lambda path: path.name)(parametrised)


def relative_imports(path: Path) -> set[str]:
    return {f"{name}.py" for name in get_relative_imports(path)}


def closure(entry: str) -> set[str]:
    """Names of all files `entry` reaches through relative imports, itself excluded unless cyclic."""
    reached: set[str] = set()
    frontier = {entry}
    while frontier:
        frontier = set().union(*(relative_imports(PACKAGE / name) for name in frontier)) - reached
        reached |= frontier
    return reached


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def readme_commands() -> list[str]:
    """The lines of README's first block of shell commands."""
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README has no block of commands"
    return block[1].strip().splitlines()


def checks_of_readme() -> list[str]:
    """The commands of README's section on checks, without the folder of the virtual environment."""
    block = re.search(r"## Checks.*?```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README has no block of checks"
    return [line.removeprefix(".venv/bin/") for line in block[1].strip().splitlines()]


@pytest.mark.parametrize("command", checks_of_readme())
def test_checks_of_readme_find_nothing(command):
    run_tool(*command.split())


def test_readme_names_every_checker():
    assert checks_of_readme() == ["ruff check .", "ruff format --check .", "mypy"]


def test_readme_installs_from_the_clone_alone():
    """The package is on no index."""
    installs = re.findall(r"pip install.*?(?=[`&\n])", (ROOT / "README.md").read_text())
    assert len(installs) == 3
    assert [install for install in installs if '-e ".[' not in install] == []


@travelling
def test_mlinter_finds_nothing(path):
    violations = mlinter.analyze_file(path, path.read_text(), enabled_rules=MLINTER_RULES)
    assert [mlinter.format_violation(violation) for violation in violations] == []


@travelling
def test_imports_are_flat_and_acyclic(path):
    assert path.name not in closure(path.name), "cyclic relative import: diffusers' loader does not terminate on one"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            assert node.level == 1
            assert node.module, "`from . import x` is invisible to the Hub's file collector"
            assert "." not in node.module


@travelling
def test_entry_files_import_their_whole_closure_directly(path):
    """Both libraries' loaders copy the direct imports of an entry file; diffusers' copies nothing else."""
    assert relative_imports(path) == closure(path.name)


@travelling
def test_travelling_files_stay_among_themselves(path):
    assert closure(path.name) <= {file.name for file in TRAVELLING_FILES}


@travelling
def test_travelling_files_need_only_what_a_user_of_both_libraries_has(path):
    allowed = {"torch", "transformers", "huggingface_hub", "PIL", "numpy", "packaging"}
    if path.name == "pipeline_emu.py":
        allowed.add("diffusers")
    needed = {name.split(".")[0] for name in get_imports(path)} - sys.stdlib_module_names
    assert needed <= allowed


@travelling
def test_travelling_files_carry_the_licence(path):
    head = path.read_text()[:700]
    assert head.startswith("# Copyright ")
    assert "http://www.apache.org/licenses/LICENSE-2.0" in head


def test_tracked_files_name_no_machine():
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{i}: {line[:160]}" for i, line in enumerate(lines, 1) if MACHINE.search(line)
        ]
    assert found == []


def project_requirements(extra: str = "") -> list[Requirement]:
    """What the package asks for, with one of its extras; an extra that names others of its own brings theirs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    found = []
    for requirement in map(Requirement, lines):
        if canonicalize_name(requirement.name) == project["name"]:
            found += [entry for name in requirement.extras for entry in project_requirements(name)]
        else:
            found.append(requirement)
    return found


def installed_closure(requirements: list[Requirement]) -> set[str]:
    """Names of all packages that these bring in here; what a package pins exactly (torch its CUDA) is its own affair."""
    names: set[str] = set()
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in names or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        names.add(name)
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if not any(specifier.operator == "==" for specifier in needed.specifier):
                waiting += [(needed, extra) for extra in ("", *requirement.extras)]
    return names


def test_constraints_pin_what_development_installs():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    pinned = {canonicalize_name(pin.partition("==")[0]) for pin in pins}
    needed = installed_closure([*project_requirements(), *project_requirements("dev")])
    assert {"torch", "datasets", "scipy"} <= needed
    assert sorted(needed - pinned) == []


def imported_with(path: Path) -> set[str]:
    """Packages that importing a module imports: all of its imports but those inside functions."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize(
    ("pattern", "extras"),
    [
        ("modeling_emu/*.py", ["video"]),
        ("modeling_emu/cli/*.py", []),
        ("modeling_emu/hub/*.py", []),
        ("modeling_emu/data/*.py", ["train"]),
        ("modeling_emu/evaluation/*.py", []),
        ("modeling_emu/shapes/*.py", ["train", "video"]),
        ("modeling_emu/training/*.py", ["train"]),
        ("conversion/*.py", ["conversion"]),
    ],
)
def test_requirements_name_what_the_code_imports(pattern, extras):
    """Nothing is left to what another package happens to bring; trackers that nobody chose are not imported."""
    named = {
        canonicalize_name(requirement.name) for extra in ("", *extras) for requirement in project_requirements(extra)
    }
    distributions = metadata.packages_distributions()
    for path in ROOT.glob(pattern):
        modules = {name.split(".")[0] for name in get_imports(path)} - sys.stdlib_module_names
        assert not TRACKERS & imported_with(path), f"{path.name} imports a tracker whatever report_to says"
        ours = {"conversion", "modeling_emu"}
        needed = {canonicalize_name(distributions[name][0]) for name in modules - ours - TRACKERS}
        assert needed <= named, f"{path.name} imports {needed - named}"


def test_ci_runs_the_second_command_of_readme():
    commands = readme_commands()
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_readme_tree_names_existing_files():
    tree = re.search(r"## Files.*?```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree, "README has no file tree"
    names, folders = [], []
    for line in tree[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folders = folders[: indent // 2]
        names.append("/".join([*folders, name.rstrip("/")]))
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    missing = [name for name in names if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*.md")), ids=lambda path: path.name)
def test_model_cards_say_what_the_hub_asks(path):
    card = ModelCard.load(path)
    metadata = card.data.to_dict()
    assert metadata["license"] == "other"
    assert metadata["license_name"]
    assert metadata["license_link"]
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "any-to-any")
    assert ("base_model" in metadata) == (path.name != "emu-assembled.md")
    assert {"emu", "custom_code", "arxiv:2307.05222"} <= set(metadata["tags"])
    assert "arxiv.org/abs/2307.05222" in card.text


PAGES = pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*.md"))], ids=lambda path: path.name
)


@PAGES
def test_every_loading_line_of_a_page_trusts_the_repository(path):
    lines = [line for line in path.read_text().splitlines() if ".from_pretrained(" in line]
    assert [line for line in lines if "trust_remote_code=True" not in line] == []


@PAGES
def test_python_of_a_page_parses(path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        compile(block, path.name, "exec")
