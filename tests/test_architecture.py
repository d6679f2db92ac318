"""The arrows between the folders, and no circle between modules."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# What each folder may import from, beside itself
ARROWS = {
    "modeling_san/commands": {"hub_card", "training", "processing", "modeling_san"},
    "hub_card": {"training", "processing", "modeling_san"},
    "training": {"processing", "modeling_san"},
    "processing": set(),
    "modeling_san": set(),
}
# Where the two halves of the package meet, by name and on first use: its front door, and what tells the Auto classes
MEETING_PLACES = {"modeling_san", "modeling_san.auto"}


def find_modules():
    """Each module's folder and file, by the name it is imported by."""
    modules = {}
    for folder in ARROWS:
        package = folder.replace("/", ".") if folder.startswith("modeling_san") else f"modeling_san.{folder}"
        for path in (REPOSITORY / folder).rglob("*.py"):
            parts = (package, *path.relative_to(REPOSITORY / folder).with_suffix("").parts)
            name = ".".join(parts).removesuffix(".__init__")
            modules.setdefault(name, (folder, path))
    return modules


MODULES = find_modules()


@cache
def imports_of(name):
    """The project's modules that a module imports, in functions too."""
    path = MODULES[name][1]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            # `from . import drawing` means the module, `from . import __version__` the package
            found |= names if names <= set(MODULES) else names | {source}
    return {module for module in found if module in MODULES} - {name}


def test_imports_follow_the_arrows():
    upward = [
        f"{name} imports {target}"
        for name, (folder, _) in MODULES.items()
        if name not in MEETING_PLACES
        for target in imports_of(name)
        if MODULES[target][0] not in {folder, *ARROWS[folder]}
    ]
    assert upward == []


def test_modules_import_each_other_in_no_circle():
    graph = {name: imports_of(name) - MEETING_PLACES for name in MODULES if name not in MEETING_PLACES}
    list(TopologicalSorter(graph).static_order())  # a circle raises CycleError, which names it


def test_each_module_says_whose_it_is_and_under_which_licence():
    head = "# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0."
    texts = {name: path.read_text(encoding="utf-8") for name, (_, path) in MODULES.items()}
    assert [name for name, text in texts.items() if text and text.splitlines()[0] != head] == []
