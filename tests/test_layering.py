"""Who may import whom, read from the source of every file; and the size of the files themselves."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room, and what of diffjax its files may import beside the room itself.
ROOMS = {
    'core': (),
    'nets': ('core.types',),
    'data': (),
    'weights': ('core.types', 'nets'),
    'tasks': ('core', 'nets'),
    'evaluation': ('core', 'nets', 'weights'),
    'training': ('core.types', 'tasks', 'data', 'evaluation'),
}
TOP = (
    'plan_files',
    'settings',
    'values',
    'json_files',
    'components',
    'clips',
    'learning',
    'restoring',
    'latents',
    'edits',
    'build',
    'starting',
    'workdir',
    'kept_samples',
    'run',
    'clip_figures',
    'results',
    'first_stage',
    'encoding',
    'stages',
    'recognition',
    'baselines',
    'kinds',
    'loading',
    'command',
    'main',
    'preview',
)
ALL = (*ROOMS, *TOP)
CORE_NEEDS = ('jax', 'numpy')  # beside the standard library
CORE_NEEDS_LAZILY = {'oracles.py': ('scipy',), 'grids.py': ('scipy',), 'likelihood.py': ('diffrax',)}  # in functions


def imports(path, package):
    """(module, inside a function or under TYPE_CHECKING) for each import in a file. package: its dotted package."""

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package.split('.')[: len(package.split('.')) - node.level + 1]) if node.level else ''
            module = '.'.join(part for part in (base, node.module) if part)
            for alias in node.names:
                yield f'{module}.{alias.name}', lazy
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or deferred or checking)

    yield from visit(ast.parse(path.read_text()), False)


def modules(root):
    """{dotted name: path} of every file of the package `diffjax` under root."""
    found = {}
    for path in sorted((root / 'diffjax').rglob('*.py')):
        parts = path.relative_to(root).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def resolve(name, known):
    """The module that an imported name is, or is in: diffjax.core.types.Array -> diffjax.core.types."""
    while name and name not in known:
        name = name.rpartition('.')[0]
    return name


def within(name, allowed):
    return any(name == entry or name.startswith(f'{entry}.') for entry in allowed)


def standard(name):
    return name.split('.')[0] in sys.stdlib_module_names


def violations(root):
    """One line for everything that stands against the design."""
    known, found, graph = modules(root), [], {}
    for module, path in known.items():
        package = module if path.name == '__init__.py' else module.rpartition('.')[0]
        inside = module.removeprefix('diffjax').removeprefix('.')
        room = inside.split('.')[0]
        free = path.name == '__main__.py' or room not in ROOMS
        if room and room not in ALL:
            found.append(f'{module}: there is no room called {room} in the design')
        for name, lazy in imports(path, package):
            if not within(name, ['diffjax']):
                if within(name, ['flax']) and room != 'nets':
                    found.append(f'{module} imports {name}: Flax belongs to nets alone')
                allowed = (*CORE_NEEDS, *(CORE_NEEDS_LAZILY.get(path.name, ()) if lazy else ()))
                if room == 'core' and not standard(name) and not within(name, allowed):
                    found.append(f'{module} imports {name}: core is jax and numpy')
                continue
            target = resolve(name, known).removeprefix('diffjax').removeprefix('.')
            if not free and not within(target, [room, *ROOMS[room]]):
                found.append(f'{module} imports {target or "diffjax"}: {room} may import {ROOMS[room]}')
            if target.endswith('__main__') or within(target, ['main', 'preview']):
                found.append(f'{module} imports a command, {target}')
            if not lazy:
                graph.setdefault(module, set()).add(resolve(name, known))
    return found + [f'a circle: {" -> ".join(circle)}' for circle in circles(graph)]


def circles(graph):
    """Circles of imports at the top of files. An `__init__` and the files of its own folder count as they import."""
    found, done = [], set()

    def walk(node, path):
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for other in sorted(graph.get(node, ())):
                if other != node:
                    walk(other, [*path, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


def test_the_layers_hold():
    assert violations(ROOT) == []


def test_the_commands_below_the_top_import_downwards():
    """Each file beside the rooms sees of the others those before it in TOP."""
    known = modules(ROOT)
    assert {name.split('.')[1] for name in known if name.count('.') == 1} - set(ROOMS) == set(TOP)
    for place, name in enumerate(TOP):
        for imported, _ in imports(known[f'diffjax.{name}'], 'diffjax'):
            target = resolve(imported, known).removeprefix('diffjax.').split('.')[0]
            if target in TOP:
                assert TOP.index(target) < place, f'{name} imports {target}'


def test_configs_import_nothing_but_ml_collections():
    for path in (ROOT / 'configs').glob('*.py'):
        for name, _ in imports(path, ''):
            assert standard(name) or within(name, ['ml_collections']), f'{path.name} imports {name}'


def test_importing_the_package_is_light():
    """`import diffjax` alone loads nothing; `--helpshort` needs neither matplotlib nor scikit-learn nor diffrax."""
    heavy = ('sklearn', 'matplotlib', 'diffrax', 'tensorflow_datasets', 'tensorflow')
    for module, path in modules(ROOT).items():
        eager = [name for name, lazy in imports(path, module) if not lazy]
        if module == 'diffjax':
            assert eager == []
        if 'dataset_builder' not in module:
            assert not [name for name in eager if within(name, heavy)], module


def test_files_are_short_and_there_is_no_drawer():
    for path in (ROOT / 'diffjax').rglob('*.py'):
        assert path.stem not in ('utils', 'util', 'helpers', 'misc', 'common'), path
        assert len(path.read_text().splitlines()) < 400, path


TREES = {
    'core imports a network': ({'core/a.py': 'from diffjax import nets', 'nets/__init__.py': ''}, 'core may import'),
    'core imports Flax in a function': ({'core/a.py': 'def f():\n    import flax.linen'}, 'Flax belongs to nets'),
    'core imports scipy at the top': ({'core/oracles.py': 'import scipy.stats'}, 'core is jax and numpy'),
    'core imports scipy elsewhere': ({'core/a.py': 'def f():\n    import scipy'}, 'core is jax and numpy'),
    'nets import losses': ({'nets/a.py': 'from diffjax.core.losses import Loss', 'core/losses.py': ''}, 'nets may'),
    'nets import losses by the room': ({'nets/a.py': 'from diffjax.core import losses', 'core/losses.py': ''}, 'nets'),
    'data imports the core': ({'data/a.py': 'import diffjax.core.types', 'core/types.py': ''}, 'data may import'),
    'tasks import training': ({'tasks/a.py': 'from ..training import loop', 'training/loop.py': ''}, 'tasks may'),
    'training imports the nets': ({'training/a.py': 'from diffjax.nets import x', 'nets/__init__.py': ''}, 'training'),
    'training imports build': ({'training/a.py': 'from diffjax.build import x', 'build.py': ''}, 'training may'),
    'evaluation imports tasks': ({'evaluation/a.py': 'from diffjax.tasks import x', 'tasks/__init__.py': ''}, 'may'),
    'Flax in tasks': ({'tasks/a.py': 'from flax import linen'}, 'Flax belongs to nets alone'),
    'an unknown room': ({'extras/a.py': ''}, 'no room called extras'),
    'a file nobody planned': ({'tools.py': ''}, 'no room called tools'),
    'a command is imported': ({'run.py': 'from diffjax.main import start', 'main.py': ''}, 'imports a command'),
    'a circle of two': (
        {'core/a.py': 'from diffjax.core import b', 'core/b.py': 'from diffjax.core.a import x'},
        'a circle: diffjax.core.a -> diffjax.core.b -> diffjax.core.a',
    ),
    'a circle of three': (
        {'run.py': 'from . import results', 'results.py': 'import diffjax.build', 'build.py': 'from .run import load'},
        'a circle',
    ),
}


def plant(root, files):
    for name, text in files.items():
        path = root / 'diffjax' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize('name', TREES)
def test_the_checker_sees(tmp_path, name):
    files, message = TREES[name]
    plant(tmp_path, files)
    assert any(message in line for line in violations(tmp_path))


def test_the_checker_lets_pass(tmp_path):
    plant(
        tmp_path,
        {
            '__init__.py': 'def __getattr__(name):\n    from diffjax.run import load\n    return load',
            'core/types.py': 'import functools\nimport jax.numpy as jnp',
            'core/oracles.py': 'from diffjax.core.types import A\ndef f():\n    from scipy import stats',
            'nets/dit.py': 'from flax import linen as nn\nfrom diffjax.core.types import Array',
            'data/__main__.py': 'from diffjax.core import types',
            'training/loop.py': 'from diffjax.core.types import A\nfrom diffjax.data import b',
            'data/__init__.py': '',
            'build.py': 'from diffjax import nets\nfrom diffjax.training.loop import Settings',
            'run.py': 'from diffjax.build import build',
        },
    )
    assert violations(tmp_path) == []
