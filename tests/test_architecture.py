"""The directions and laws of the house, read from the source; each check also sees a breach that it must find."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANKS = {
    "": -1,
    "errors": -2,
    "files": -2,
    "setting": -1,
    "geometry": 0,
    "schedule": 0,
    "metrics": 0,
    "storage": 0,
    "jsonfile": 0,
    "playback": 0,
    "mp4": 0,
    "chain": 0,
    "config": 1,
    "model": 2,
    "diffusion": 3,
    "data": 4,
    "media": 4,
    "training": 5,
    "engine": 5,
    "evaluate": 6,
    "pipeline": 6,
    "client": 6,
    "cli": 0,  # parses words; what a verb runs is loaded by its name
    "jobs": 7,
    "serve": 7,
}
# Rooms inside the three largest folders. A room imports rooms of lower ranks, and itself.
ROOMS = {
    "serve": {
        **dict.fromkeys(("records", "settings", "tokens", "rpc", "ray_metrics"), 0),
        **dict.fromkeys(("actors", "tracing"), 1),
        **dict.fromkeys(("policies", "wire", "provenance"), 2),
        **dict.fromkeys(("gateway", "store", "replica"), 3),  # the three processes reach each other by handle alone
        "api": 4,
        **dict.fromkeys(("app", "keys", "describe"), 5),
    },
    "jobs": {
        **dict.fromkeys(("ray_cluster", "ray_metrics"), 0),
        "runs": 1,
        "workers": 2,
        **dict.fromkeys(("pairs", "pretrain", "distill_decoder", "export", "promote", "import_student", "replay"), 3),
        **dict.fromkeys(("ode_init", "evaluate"), 4),
        **dict.fromkeys(("distill", "search"), 5),
        "benchmarks": 6,
    },
    "diagonal.evaluate": {
        **dict.fromkeys(("intervals", "environment", "pictures", "contact_sheet", "plots"), 0),
        **dict.fromkeys(("quality", "load"), 1),
        **dict.fromkeys(("experiments", "bench", "simulation"), 2),
    },
}
MOST_ARROWS = {"serve": 45, "jobs": 32, "diagonal.evaluate": 8}
APART = {("api", "store"), ("api", "replica"), ("policies", "rpc")}  # though the ranks would let them
NOT_YET: set[str] = set()
EDGE_LIBRARIES = {"ray", "fastapi", "pydantic", "starlette", "uvicorn"}
LOOKS_INTO_SERVE = (
    "jobs/benchmarks/service_policies.py"  # a simulation runs the service's own decisions: this file alone
)
NO_PACKAGE = ("platform", "jobs", "serve")
LONGEST_FILE, LONGEST_FUNCTION = 550, 120
MODEL_NUMBERS = {1560, 4680, 32760}
NETWORK_NAMES = {"network", "generator", "student", "transformer", "model"}
DRAWS = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "rand_like",
    "randn_like",
    "randint_like",
    "normal",
    "bernoulli",
    "multinomial",
    "poisson",
    "normal_",
    "uniform_",
    "random_",
    "bernoulli_",
    "exponential_",
}
GLOBAL_SEEDS = {
    "torch.manual_seed",
    "torch.seed",
    "torch.default_generator",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
}
SEEDED_NUMPY = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox", "BitGenerator"}


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the repository's root, with slashes, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def unit(self) -> str:
        """What the import directions speak of: a module or folder of the package, or a top-level folder."""
        parts = Path(self.path).with_suffix("").parts
        if parts[:2] != ("platform", "diagonal"):
            return parts[0]
        return "" if parts[2] == "__init__" else parts[2]

    @property
    def in_package(self) -> bool:
        return self.path.startswith("platform/")

    def walk(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in self.nodes if not kinds or isinstance(node, kinds))


@functools.cache
def sources() -> list[Source]:
    paths = (path for top in ("platform", "jobs", "serve", "infra", "tests") for path in (ROOT / top).rglob("*.py"))
    ours = (path for path in paths if "assets" not in path.parts)  # a release's own program is in the package already
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in sorted(ours)]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute of one; what stands before a call or a subscript is dropped."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def imported(source: Source) -> Iterator[str]:
    """Every module that the file names in an import, wherever it stands; `from a import b` gives a and a.b."""
    package = source.path.removesuffix(".py").removeprefix("platform/").split("/")
    for node in source.walk(ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: -node.level]) if node.level else ""
            module = ".".join(part for part in (start, node.module or "") if part)
            yield from (name for alias in node.names for name in (module, f"{module}.{alias.name}"))


def unit_of(module: str) -> str | None:
    top, _, rest = module.partition(".")
    unit = rest.partition(".")[0] if top == "diagonal" else top
    return unit if unit in RANKS and (top == "diagonal" or unit in ("jobs", "serve")) else None


def imports_go_down(source: Source) -> Iterator[str]:
    """A file imports lower ranks and its own folder only; the client sees nothing above the configuration."""
    limit = 2 if source.unit == "client" else RANKS.get(source.unit, 99)
    for module in imported(source):
        unit = unit_of(module)
        if (source.path, unit) == (LOOKS_INTO_SERVE, "serve"):
            continue
        if unit is not None and unit != source.unit and RANKS[unit] >= limit:
            yield f"{source.path} imports {module}"


def room_of(module: str) -> tuple[str, str] | None:
    """The folder among `ROOMS` that a module lies in, and its room there."""
    for house in ROOMS:
        if module.startswith(f"{house}."):
            return house, module.removeprefix(f"{house}.").partition(".")[0]
    return None


def room_imports(source: Source) -> Iterator[tuple[str, str, str, str]]:
    """Each import from one room of a folder into another: the folder, both rooms, and the module."""
    module = source.path.removesuffix(".py").removeprefix("platform/").replace("/", ".")
    if (here := room_of(module)) is None:
        return
    for name in imported(source):
        there = room_of(name)
        if there is not None and there[0] == here[0] and there[1] in ROOMS[here[0]] and there != here:
            if not any(f"{source.path} imports {name}".startswith(breach) for breach in NOT_YET):
                yield *here, there[1], name


def rooms_import_down(source: Source) -> Iterator[str]:
    for house, room, other, module in room_imports(source):
        if ROOMS[house][other] >= ROOMS[house].get(room, 99) or (room, other) in APART:
            yield f"{source.path} imports {module}"


def every_room_has_a_rank(source: Source) -> Iterator[str]:
    module = source.path.removesuffix(".py").removeprefix("platform/").replace("/", ".")
    here = room_of(module)
    if here is not None and here[1] != "__init__" and here[1] not in ROOMS[here[0]]:
        yield f"{source.path}: {here[1]} has no rank"


def every_unit_has_a_rank(source: Source) -> Iterator[str]:
    if source.in_package and source.unit not in RANKS:
        yield f"{source.path}: {source.unit} has no rank"


def edge_libraries_stay_at_the_edge(source: Source) -> Iterator[str]:
    """Ray and the web framework live in jobs/ and serve/; the client does without torch too."""
    banned = EDGE_LIBRARIES | ({"torch", "diffusers", "transformers"} if source.unit in ("client", "cli") else set())
    for module in imported(source) if source.in_package else ():
        if module.partition(".")[0] in banned:
            yield f"{source.path} imports {module}"


def first_statement_is_a_docstring(source: Source) -> Iterator[str]:
    if not ast.get_docstring(source.tree):
        yield f"{source.path} does not say what it is"


def files_are_short(source: Source) -> Iterator[str]:
    if (lines := len(source.text.splitlines())) > LONGEST_FILE:
        yield f"{source.path} has {lines} lines"


def functions_are_short(source: Source) -> Iterator[str]:
    for node in source.walk(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
        if (lines := (node.end_lineno or 0) - first.lineno + 1) > LONGEST_FUNCTION:
            yield f"{source.path}: {node.name} has {lines} lines"


def no_file_is_called_utils(source: Source) -> Iterator[str]:
    if Path(source.path).stem in ("utils", "util"):
        yield source.path


def no_global_statement(source: Source) -> Iterator[str]:
    yield from (f"{source.path}:{node.lineno}" for node in source.walk(ast.Global) if isinstance(node, ast.Global))


def no_work_at_import(source: Source) -> Iterator[str]:
    """A module defines; it does not call, loop or open anything for its effect when it is imported.

    Alembic's `env.py` is a script, which Alembic runs and nothing imports.
    """
    for node in source.tree.body if source.unit != "tests" and not source.path.endswith("/env.py") else ():
        call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if call or isinstance(node, ast.For | ast.While | ast.With):
            yield f"{source.path}:{node.lineno}"


def no_broad_except(source: Source) -> Iterator[str]:
    """Outside tests an `except` names what it expects; the two edges say `edge: why` there."""
    lines = source.text.splitlines()
    for node in source.walk(ast.ExceptHandler) if source.unit != "tests" else ():
        assert isinstance(node, ast.ExceptHandler)
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in kinds)
        if broad and not re.search(r"#.*\bedge:", lines[node.lineno - 1]):
            yield f"{source.path}:{node.lineno}"


def no_second_denoising_loop(source: Source) -> Iterator[str]:
    """Only `denoise_chunk` runs a network level by level, or predicts and re-noises in one loop."""
    for function in source.walk(ast.FunctionDef) if source.unit != "tests" else ():
        assert isinstance(function, ast.FunctionDef)
        if (source.path, function.name) == ("platform/diagonal/diffusion/rollout.py", "denoise_chunk"):
            continue
        for loop in (node for node in ast.walk(function) if isinstance(node, ast.For | ast.While)):
            over = ast.unparse(loop.iter if isinstance(loop, ast.For) else loop.test)
            calls = {dotted(node.func).rpartition(".")[2] for node in ast.walk(loop) if isinstance(node, ast.Call)}
            if ("levels" in over and calls & NETWORK_NAMES) or {"to_clean", "blend"} <= calls:
                yield f"{source.path}:{loop.lineno} in {function.name}"


def denoise_chunk_stands_in_one_place(source: Source) -> Iterator[str]:
    for node in source.walk(ast.FunctionDef):
        if isinstance(node, ast.FunctionDef) and node.name == "denoise_chunk":
            if source.path != "platform/diagonal/diffusion/rollout.py":
                yield f"{source.path}:{node.lineno}"


def nothing_draws_from_the_global_generator(source: Source) -> Iterator[str]:
    """Each draw names its generator. Building a network may seed the global one inside `torch.random.fork_rng`."""
    if not source.in_package:
        return
    forked = {
        inner
        for node in source.walk(ast.With)
        if isinstance(node, ast.With) and "fork_rng" in ast.unparse(node.items[0].context_expr)
        for inner in ast.walk(node)
    }
    for node in source.walk(ast.Call, ast.Attribute):
        if node not in forked and _is_global_draw(node):
            yield f"{source.path}:{node.lineno} {ast.unparse(node)}"  # type: ignore[attr-defined]


def _is_global_draw(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return dotted(node) in GLOBAL_SEEDS
    assert isinstance(node, ast.Call)
    module, _, function = dotted(node.func).rpartition(".")
    if module in ("np.random", "numpy.random"):
        return function not in SEEDED_NUMPY or not (node.args or node.keywords)
    if module == "random":
        return function != "Random" or not node.args
    method = isinstance(node.func, ast.Attribute) and function.endswith("_")
    return function in DRAWS and (module == "torch" or method) and "generator" not in {k.arg for k in node.keywords}


def no_number_of_the_model(source: Source) -> Iterator[str]:
    """Token counts come from `ChunkGeometry`."""
    for node in source.walk(ast.Constant) if source.in_package else ():
        if isinstance(node, ast.Constant) and node.value in MODEL_NUMBERS:
            yield f"{source.path}:{node.lineno} {node.value}"


Check = Callable[[Source], Iterator[str]]
CORE = "platform/diagonal/diffusion/flow.py"
DOC = '"""Says what it is."""\n'
BREACHES: list[tuple[Check, str, str]] = [
    (imports_go_down, CORE, "from diagonal.engine import session"),
    (imports_go_down, CORE, "from diagonal import engine"),
    (imports_go_down, CORE, "from ..engine.session import Session"),
    (imports_go_down, CORE, "def f():\n    import diagonal.data.world as world"),
    (imports_go_down, "platform/diagonal/geometry.py", "from diagonal.schedule import StepSchedule"),
    (imports_go_down, "platform/diagonal/media/encode.py", "from diagonal.data.world import render"),
    (imports_go_down, "platform/diagonal/training/loop.py", "from diagonal.engine.session import Session"),
    (imports_go_down, "platform/diagonal/evaluate/bench/bench.py", "import jobs.distill"),
    (imports_go_down, "platform/diagonal/evaluate/bench/bench.py", "from diagonal.client import DiagonalClient"),
    (imports_go_down, "platform/diagonal/client/commands.py", "from diagonal.model import dit"),
    (imports_go_down, "serve/app.py", "from jobs.export import main"),
    (imports_go_down, "jobs/benchmarks/load.py", "from serve.policies.routing import Ranking"),
    *(
        (rooms_import_down, path, f"from {module} import x")
        for path, module in (
            ("serve/gateway/gateway.py", "serve.store.tables"),
            ("serve/gateway/gateway.py", "serve.api.headers"),
            ("serve/store/store.py", "serve.gateway.gateway"),
            ("serve/replica/replica.py", "serve.store"),
            ("serve/api/routes.py", "serve.store.tables"),
            ("serve/wire/schemas.py", "serve.provenance.watermarks"),
            ("serve/records.py", "serve.settings"),
            ("jobs/runs/plan.py", "jobs.workers.worker"),
            ("jobs/workers/worker.py", "jobs.distill"),
            ("platform/diagonal/evaluate/load/figures.py", "diagonal.evaluate.bench"),
        )
    ),
    (rooms_import_down, "serve/gateway/gateway.py", "from serve import store"),
    (rooms_import_down, "serve/gateway/gateway.py", "from ..store import tables"),
    (every_room_has_a_rank, "serve/extras/thing.py", ""),
    (every_unit_has_a_rank, "platform/diagonal/extras/thing.py", ""),
    (edge_libraries_stay_at_the_edge, CORE, "import ray"),
    (edge_libraries_stay_at_the_edge, CORE, "def f():\n    from ray.util.metrics import Gauge"),
    (edge_libraries_stay_at_the_edge, "platform/diagonal/cli.py", "import torch"),
    (first_statement_is_a_docstring, CORE, "import math"),
    (files_are_short, CORE, DOC + "x = 1\n" * LONGEST_FILE),
    (functions_are_short, CORE, "def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION + 1)),
    (no_file_is_called_utils, "platform/diagonal/model/utils.py", DOC),
    (no_global_statement, CORE, "def f():\n    global x\n    x = 1"),
    (no_work_at_import, CORE, DOC + "print('imported')"),
    (no_work_at_import, CORE, DOC + "for x in range(3):\n    y = x"),
    (no_broad_except, CORE, "try:\n    f()\nexcept Exception:\n    pass"),
    (
        no_broad_except,
        "serve/replica/replica.py",
        "try:\n    f()\nexcept (ValueError, BaseException) as error:\n    pass",
    ),
    (no_broad_except, CORE, "try:\n    f()\nexcept:\n    pass"),
    (no_second_denoising_loop, CORE, "def f():\n    for level in schedule.levels(0):\n        self.network(x, level)"),
    (no_second_denoising_loop, "jobs/pairs.py", "def f():\n    while go:\n        x = blend(to_clean(x, v, a), e, b)"),
    (denoise_chunk_stands_in_one_place, "platform/diagonal/engine/engine.py", "def denoise_chunk(): ..."),
    *(
        (nothing_draws_from_the_global_generator, CORE, text)
        for text in (
            "torch.randn(3)",
            "torch.randn_like(x)",
            "x.normal_()",
            "torch.manual_seed(0)",
            "np.random.rand(3)",
            "np.random.default_rng()",
            "random.choice(x)",
            "torch.default_generator.manual_seed(0)",
            "random.Random()",
        )
    ),
    (no_number_of_the_model, CORE, "tokens = 3 * 1560"),
]
INNOCENTS: list[tuple[Check, str, str]] = [
    (imports_go_down, CORE, "from diagonal.schedule import warp\nfrom .noise import generator\nimport platform"),
    (
        imports_go_down,
        "serve/app.py",
        "from ray import serve\nfrom serve.store.store import Store\nimport diagonal.config",
    ),
    (imports_go_down, "jobs/distill.py", "from diagonal.training import loop"),
    (rooms_import_down, "serve/gateway/gateway.py", "from serve.gateway import fleet\nimport serve.wire.problems"),
    (rooms_import_down, "serve/app.py", "import serve.store.store\nfrom diagonal.evaluate import quality"),
    (every_room_has_a_rank, "serve/store/__init__.py", ""),
    (imports_go_down, LOOKS_INTO_SERVE, "from serve.policies.routing import Ranking"),
    (imports_go_down, "platform/diagonal/client/commands.py", "from diagonal.config import Config"),
    (edge_libraries_stay_at_the_edge, "jobs/distill.py", "import ray"),
    (no_work_at_import, CORE, DOC + "import math\nTABLE = dict(a=1)\nif __name__ == '__main__':\n    main()"),
    (
        no_broad_except,
        "serve/replica/replica.py",
        "try:\n    f()\nexcept Exception:  # edge: one session's fault\n    pass",
    ),
    (no_broad_except, CORE, "try:\n    f()\nexcept (ValueError, KeyError):\n    pass"),
    (no_second_denoising_loop, CORE, "def f():\n    for item in kept:\n        network(item.written, item.level)"),
    *(
        (nothing_draws_from_the_global_generator, CORE, text)
        for text in (
            "torch.randn(3, generator=g)",
            "np.random.default_rng(seed)",
            "random.Random(3).random()",
            "with torch.random.fork_rng(devices=[]):\n    torch.default_generator.manual_seed(0)",
        )
    ),
]
CHECKS = list(dict.fromkeys(check for check, _, _ in BREACHES))


def name(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=name)
def test_the_tree_keeps_the_law(check: Check) -> None:
    assert [breach for source in sources() for breach in check(source)] == []


@pytest.mark.parametrize(("check", "path", "text"), BREACHES, ids=name)
def test_the_check_sees_a_breach(check: Check, path: str, text: str) -> None:
    assert list(check(Source(path, text)))


@pytest.mark.parametrize(("check", "path", "text"), INNOCENTS, ids=name)
def test_the_check_lets_right_code_pass(check: Check, path: str, text: str) -> None:
    assert list(check(Source(path, text))) == []


@pytest.mark.parametrize("house", ROOMS)
def test_few_arrows_join_the_rooms_and_none_of_them_close_a_circle(house: str) -> None:
    arrows = {(room, other) for source in sources() for at, room, other, _ in room_imports(source) if at == house}
    assert len(arrows) <= MOST_ARROWS[house], sorted(arrows)
    needs: dict[str, set[str]] = {}
    for room, other in arrows:
        needs.setdefault(room, set()).add(other)
    TopologicalSorter(needs).prepare()  # CycleError names a circle


def test_the_page_of_threats_names_every_number_of_a_test_and_where_it_is() -> None:
    rows = [line.split("|") for line in (ROOT / "docs/threats.md").read_text().splitlines() if line.startswith("| ")]
    named = {row[1].strip().lower(): row[-2] for row in rows}
    for source in sources():
        if source.path.startswith(("tests/serve/", "tests/faults/")):
            for numbers in re.findall(r"def test_((?:s?\d+_and_)?s?\d+)_", source.text):
                assert all(f"`{source.path}`" in named[number] for number in numbers.split("_and_")), source.path


def test_denoise_chunk_is_defined_exactly_once() -> None:
    text = (ROOT / "platform/diagonal/diffusion/rollout.py").read_text()
    assert text.count("\ndef denoise_chunk(") == 1


@pytest.mark.parametrize("folder", NO_PACKAGE)
def test_a_source_folder_is_no_package(folder: str) -> None:
    """With platform/__init__.py the standard library's `platform` is shadowed and `import torch` fails."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize(
    "given", ["platform/diagonal", "jobs", "serve", "infra", "tests", "pyproject.toml", "ray-cluster.yaml"]
)
def test_the_given_names_stand_at_the_top(given: str) -> None:
    assert (ROOT / given).exists()


@pytest.mark.parametrize("module", ["diagonal.cli", "diagonal.config", "diagonal.schedule", "diagonal.metrics"])
def test_the_client_and_the_lowest_ranks_load_neither_torch_nor_ray(module: str) -> None:
    program = f"import sys, {module}; print(sorted({{'torch', 'ray'}} & set(sys.modules)))"
    command, folder = [sys.executable, "-c", program], ROOT / "platform"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_gateway_process_loads_neither_torch_nor_a_database() -> None:
    program = "import sys, serve.api.deployment; print(sorted({'torch', 'sqlalchemy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
