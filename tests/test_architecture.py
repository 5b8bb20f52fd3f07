"""Who may know whom, read from the imports; and that no route is open by mistake."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from data.settings import Settings
from data.types import Role
from service.app import create_app
from service.auth import declared_role
from tests.conftest import FakeEngine, House

ROOT = Path(__file__).parent.parent
PRODUCT = ("data", "service", "trainer")

DATA_MAY_IMPORT = {"data", "sqlite_utils", "pysqlite3", "pydantic", "pydantic_settings", "typing_extensions"}
PURE = ["service/markdown.py", "service/pairing.py", "service/trial.py", "trainer/gate.py", "trainer/ppo_math.py"]
OUTSIDE_WORLD = {
    *("aiohttp", "asyncio", "fastapi", "http", "httpx", "os", "pathlib", "pysqlite3", "requests", "secrets", "socket"),
    *("sqlite3", "sqlite_utils", "starlette", "subprocess", "time", "urllib"),
}
"""What a pure module knows nothing of: files, processes, the network, the clock."""
PAGES = {f"/static/{path.name}" for path in (ROOT / "service/pages/static").iterdir()} | {"/", "/rate", "/board"}
OPEN_ROUTES = {"/healthz", "/readyz", "/metrics", "/sign-in"} | PAGES


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """The modules that a file imports, as dotted names: everywhere in it, or only what importing it imports."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            late = True
        if not (late and at_import_time):
            waiting += ast.iter_child_nodes(node)
    return found


def top(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_there_is_something_to_read() -> None:
    assert {"data/types.py", "service/app.py"} <= {str(path.relative_to(ROOT)) for path in sources(*PRODUCT)}


@pytest.mark.parametrize(("one", "other"), [("service", "trainer"), ("trainer", "service")])
def test_service_and_trainer_never_import_each_other(one: str, other: str) -> None:
    assert [path for path in sources(one) if other in top(imports(path))] == []


def test_data_imports_little_and_nothing_of_the_shifts() -> None:
    allowed = DATA_MAY_IMPORT | sys.stdlib_module_names
    breaches = {str(path): top(imports(path)) - allowed for path in sources("data")}
    assert {path: names for path, names in breaches.items() if names} == {}


def test_vllm_is_never_imported() -> None:
    assert [path for path in sources(*PRODUCT, "bench") if "vllm" in top(imports(path))] == []


def test_nothing_in_the_product_imports_bench_or_tests() -> None:
    assert [path for path in sources(*PRODUCT) if top(imports(path)) & {"bench", "tests"}] == []


def test_nothing_imports_who_wires_it() -> None:
    wiring = {"service.app", "trainer.job"}
    entry_points = {"trainer/__main__.py"}
    breaches = []
    for path in sources(*PRODUCT):
        names = {name for module in imports(path) for name in (module, module.rpartition(".")[0])}
        if names & wiring and str(path.relative_to(ROOT)) not in entry_points:
            breaches.append(path)
    assert breaches == []


def test_the_parts_that_app_wires_know_nothing_of_each_other() -> None:
    source = (ROOT / "service/app.py").read_text()
    (loop,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For)
               and "include_router" in ast.unparse(node)]  # fmt: skip
    parts = {name.id for name in ast.walk(loop.iter) if isinstance(name, ast.Name)}
    assert parts == {path.stem for path in sources("service") if "router = APIRouter()" in path.read_text()}
    breaches = []
    for part in parts:
        known = {".".join(module.split(".")[:2]) for module in imports(ROOT / "service" / f"{part}.py")}
        breaches += [(part, other) for other in parts - {part} if f"service.{other}" in known]
    assert breaches == []


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_nothing_of_the_outside_world(name: str) -> None:
    names = imports(ROOT / name)
    assert top(names) & OUTSIDE_WORLD == set()
    ours = {".".join(module.split(".")[:2]) for module in names if top({module}) <= set(PRODUCT)}
    assert ours <= {"data.types", "data.settings"}


def test_every_pure_module_is_checked_strictly() -> None:
    checks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    (strict,) = [check["module"] for check in checks if check.get("disallow_untyped_defs")]
    assert set(strict) == {name.removesuffix(".py").replace("/", ".") for name in PURE} | {"data.*"}


def test_modules_do_not_import_each_other_in_circles() -> None:
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources(*PRODUCT)}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {}
    for name, path in files.items():
        wanted = imports(path, at_import_time=True)
        graph[name] = {
            target for module in wanted for target in (module, module.rpartition(".")[0]) if target in files
        } - {name}
    done: set[str] = set()
    while ready := {name for name, wanted in graph.items() if name not in done and wanted <= done}:
        done |= ready
    assert set(graph) - done == set()


@pytest.mark.parametrize("module", ["torch", "transformers", "peft"])
def test_the_day_shift_needs_no_torch(module: str) -> None:
    assert [path for path in sources("service", "data") if module in top(imports(path))] == []


# Routes


def routes(settings: Settings) -> list[APIRoute]:
    found = create_app(settings).routes
    assert all(isinstance(route, APIRoute) for route in found), "a mount or a plain route declares no role"
    return [route for route in found if isinstance(route, APIRoute)]


def test_every_route_but_health_metrics_and_pages_declares_a_role(settings: Settings) -> None:
    undeclared = {
        route.path
        for route in routes(settings)
        if declared_role([one.call for one in route.dependant.dependencies if one.call]) is None
    }
    assert undeclared == OPEN_ROUTES


def test_the_routes_ask_for_the_roles_that_they_should(settings: Settings) -> None:
    roles = {
        (method, route.path): declared_role([one.call for one in route.dependant.dependencies if one.call])
        for route in routes(settings)
        for method in route.methods
    }
    below_operator = {route: role for route, role in roles.items() if role in (Role.USER, Role.RATER)}
    assert below_operator == {
        ("POST", "/v1/chat/completions"): Role.USER,
        ("GET", "/v1/models"): Role.USER,
        ("GET", "/v1/models/{name}"): Role.USER,
        ("POST", "/v1/comparisons/{id}/vote"): Role.USER,
        ("GET", "/v1/comparisons/next"): Role.RATER,
        ("POST", "/v1/comparisons/{id}/pass"): Role.RATER,
        ("GET", "/v1/votes/count"): Role.RATER,
        ("GET", "/v1/session"): Role.USER,
        ("DELETE", "/v1/session"): Role.USER,
        ("GET", "/v1/conversations"): Role.USER,
        ("POST", "/v1/conversations"): Role.USER,
        ("GET", "/v1/conversations/{id}"): Role.USER,
        ("PUT", "/v1/conversations/{id}"): Role.USER,
        ("DELETE", "/v1/conversations/{id}"): Role.USER,
        ("POST", "/v1/markdown"): Role.USER,
    }


async def test_every_route_but_health_metrics_and_pages_is_401_without_a_key(house: House, engine: FakeEngine) -> None:
    for route in routes(house.settings):
        for method in route.methods:
            answer = await house.call(method, route.path.replace("{id}", "x"), role=None, json={})
            if route.path in OPEN_ROUTES:
                assert answer.status == (400 if method == "POST" else 200), route.path  # signing in with nothing
            else:
                assert answer.status == 401, route.path
    assert engine.chats == []
