"""Imports go downwards only, without cycles; lazy imports and imports for types count too."""

import ast
import graphlib

import pytest

from tests.modules import MODULES

LAYERS = (  # from the bottom; modules of a package share its layer
    "dq.errors dq.registry dq.distance dq.progress dq.packing dq.work dq.folders dq.memory "
    "dq.tables dq.checkpoints dq.allocation",
    "dq.formats dq.block_formats dq.transform dq.spec dq.blocks dq.bases dq.quantize dq.scales "
    "dq.observers dq.storage dq.presets dq.rounding dq.binarizers dq.tokens dq.kernels",
    "dq.plan dq.attention_spec",
    "dq.nn dq.checksum dq.arrivals dq.attention dq.taps dq.calls dq.calibrate dq.family dq.runtime "
    "dq.full_precision dq.inputs dq.ranges dq.trial dq.moments dq.sensitivity dq.tuning",
    "dq.method dq.engine dq.recipe dq.integration dq.registration",
    "dq.methods dq.export",
    "dq.pipelines dq.eval",
    "dq.cli dq.demo dq.scoring dq.bench dq.budgets dq.views dq.__main__ dq",
)
LAYER = {unit: layer for layer, units in enumerate(LAYERS) for unit in units.split()}


def imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.add(f"dq.relative import in line {node.lineno}")
                continue
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "dq"}


def unit(module: str) -> str:
    return ".".join(module.split(".")[:2])


GRAPH = {module: imports(module) for module in sorted(MODULES) if module != "dq"}  # dq: the façade


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_downwards(module: str) -> None:
    assert unit(module) in LAYER, f"give {unit(module)} a layer in this file"
    for target in GRAPH[module]:
        assert unit(target) in LAYER, f"{module}: no layer holds {target}"
        assert LAYER[unit(target)] <= LAYER[unit(module)], f"{module} imports upwards: {target}"
        pair = {unit(module), unit(target)}
        assert pair != {"dq.pipelines", "dq.eval"}, f"{module} and {target} must be strangers"
        if unit(module) == "dq.checkpoints":
            allowed = {"dq.checkpoints", "dq.errors"}
            assert unit(target) in allowed, f"{module} may import dq.errors only, not {target}"


def test_no_cycles() -> None:
    try:
        graphlib.TopologicalSorter(GRAPH).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")
