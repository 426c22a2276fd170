"""Loading never executes code from a file, and no path in a file leads out of its folder.

The first half reads the source: what could run code stands nowhere but where it is listed, with the reason. The second
opens folders that try.
"""

import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.data import open_source
from diffjax.weights import WeightsError, load
from diffjax.weights.sources import open_source as open_weights
from diffjax.weights.store import import_source

ROOT = Path(__file__).parents[1]
MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'marshal', 'shelve', 'joblib', 'yaml', 'code', 'ctypes', 'pty'}
CALLS = {'eval', 'exec', 'compile', '__import__', 'breakpoint'}
NAMES = {  # attributes, by their last part
    *('import_module', 'exec_module', 'run_path', 'run_module', 'spec_from_file_location', 'load_module'),
    *('system', 'popen', 'execv', 'execvp', 'spawnv'),
}
ALLOWED = {
    # a config file, which is Python that the user names by --config
    ('diffjax/command.py', 'spec_from_file_location'),
    ('diffjax/command.py', 'exec_module'),
    ('experiments/ablate.py', 'spec_from_file_location'),
    ('experiments/ablate.py', 'exec_module'),
    ('experiments/compare_models.py', 'run_path'),
    ('experiments/benchmark_models.py', 'run_path'),
    # the C library of this process, for how it keeps memory
    ('diffjax/training/heap.py', 'ctypes'),
    # modules of this package, by names that stand in it
    ('diffjax/data/preparation.py', 'import_module'),
    # other libraries to compare with, by names that stand there
    ('experiments/diffusers_reference.py', 'import_module'),
    ('experiments/kdiffusion_reference.py', 'spec_from_file_location'),
    ('experiments/kdiffusion_reference.py', 'exec_module'),
}


def findings(path, source):
    """(file, what could execute) for each place in a source file."""
    name = str(path)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((name, alias.name) for alias in node.names if alias.name.split('.')[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] in MODULES:
            yield name, node.module
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield name, node.attr
        elif isinstance(node, ast.Name) and node.id in CALLS:
            yield name, node.id
        elif isinstance(node, ast.Call):
            yield from ((name, what) for what in call_findings(node))


def call_findings(call):
    keywords = {word.arg: getattr(word.value, 'value', None) for word in call.keywords}
    if keywords.get('allow_pickle') or keywords.get('trust_remote_code') or keywords.get('shell'):
        yield next(key for key in ('allow_pickle', 'trust_remote_code', 'shell') if keywords.get(key))
    called = ast.unparse(call.func)
    if called in ('np.load', 'numpy.load') and keywords.get('allow_pickle') is not False:
        yield 'np.load without allow_pickle=False'
    if called == 'torch.load' and keywords.get('weights_only') is not True:
        yield 'torch.load without weights_only=True'


def test_nothing_executes_but_what_is_listed():
    found = set()
    for folder in ('diffjax', 'experiments', 'configs'):
        for path in sorted((ROOT / folder).rglob('*.py')):
            found |= set(findings(path.relative_to(ROOT), path.read_text()))
    assert found - ALLOWED == set()
    gone = {place for place in ALLOWED - found if (ROOT / place[0]).exists()}
    assert gone == set(), 'listed, and not there any more'


@pytest.mark.parametrize(
    'source, what',
    [
        ('import pickle', 'pickle'),
        ('from joblib import load', 'joblib'),
        ('import yaml.loader', 'yaml.loader'),
        ('eval("1")', 'eval'),
        ('f = exec', 'exec'),
        ('import runpy\nrunpy.run_path("x")', 'run_path'),
        ('np.load("x", allow_pickle=True)', 'allow_pickle'),
        ('np.load("x")', 'np.load without allow_pickle=False'),
        ('torch.load(f)', 'torch.load without weights_only=True'),
        ('AutoModel.from_pretrained("x", trust_remote_code=True)', 'trust_remote_code'),
        ('subprocess.run("x", shell=True)', 'shell'),
    ],
)
def test_what_is_found(source, what):
    assert ('x.py', what) in set(findings('x.py', source))


# Files that try -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module on the path that leaves a file where it is imported."""
    (tmp_path / 'trap_module.py').write_text(f'open({str(tmp_path / "sprung")!r}, "w").close()\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / 'sprung'
    sys.modules.pop('trap_module', None)


@pytest.fixture
def digits(tmp_path):
    open_source('digits', 'train', data_dir=tmp_path / 'data')
    return tmp_path / 'data' / 'digits' / '1.0.0'


@pytest.mark.parametrize('key', ['pythonClassName', 'python_class_name'])
def test_a_dataset_imports_no_module(trap, digits, tmp_path, key):
    text = (digits / 'features.json').read_text()
    real = '"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image"'
    assert real in text
    (digits / 'features.json').write_text(text.replace(real, f'"{key}": "trap_module.Image"'))
    with pytest.raises(ValueError, match="'trap_module.Image' is no feature of tensorflow_datasets"):
        open_source('digits', 'train', data_dir=tmp_path / 'data')
    assert not trap.exists()
    import trap_module  # noqa: F401  the trap works

    assert trap.exists()


@pytest.mark.parametrize('key', ['"name": "digits"', '"name": "train"', '"filepathTemplate": "'])
@pytest.mark.parametrize('place', ['../', '/tmp/', '..\\\\\\\\'])
def test_a_dataset_stays_in_its_folder(digits, tmp_path, key, place):
    text = (digits / 'dataset_info.json').read_text()
    head, quote, value = key.rpartition(': "')
    (digits / 'dataset_info.json').write_text(text.replace(key, f'{head}{quote}{place}{value}'))
    with pytest.raises(ValueError, match='is no name: it would lead out of the folder'):
        open_source('digits', 'train', data_dir=tmp_path / 'data')


def test_a_feature_is_no_path(digits, tmp_path):
    """TFDS reads FEATURE.labels.txt beside the data."""
    text = (digits / 'features.json').read_text()
    (digits / 'features.json').write_text(text.replace('"label"', '"../label"'))
    with pytest.raises(ValueError, match='is no name of a feature'):
        open_source('digits', 'train', data_dir=tmp_path / 'data')


def test_a_shard_stays_in_its_folder(digits, tmp_path):
    (shard,) = digits.glob('digits-train*')
    moved(digits, shard.name, tmp_path / 'elsewhere' / shard.name)
    with pytest.raises(ValueError, match=f'{shard.name} is a link that leads out of its dataset'):
        open_source('digits', 'train', data_dir=tmp_path / 'data')
    digits.parent.rename(tmp_path / 'whole')
    (tmp_path / 'elsewhere' / shard.name).replace(tmp_path / 'whole' / '1.0.0' / shard.name)
    digits.parent.symlink_to(tmp_path / 'whole')  # the whole dataset: whoever set the link has given it
    assert len(open_source('digits', 'train', data_dir=tmp_path / 'data')) == 1437


@pytest.fixture
def source(tmp_path):
    """A folder of weights in two files with an index."""
    sys.path.insert(0, str(ROOT / 'tests' / 'weights'))
    from tiny_dit import CONFIG, draw

    sys.path.pop(0)
    folder, tensors = tmp_path / 'source', draw(np.float16)
    folder.mkdir()
    names = list(tensors)
    places = {name: f'part-{i % 2}.safetensors' for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    return folder


def moved(source, name, to):
    """A file of the folder is elsewhere, and a link stands in its place."""
    to.parent.mkdir(parents=True, exist_ok=True)
    (source / name).rename(to)
    (source / name).symlink_to(to)


@pytest.mark.parametrize('name', ['part-0.safetensors', 'model.safetensors.index.json', 'config.json'])
def test_weights_stay_in_their_folder(source, tmp_path, name):
    moved(source, name, tmp_path / 'elsewhere' / name)
    with pytest.raises(WeightsError, match=f'{name}: a link that leads out of its folder, to {tmp_path}/elsewhere'):
        open_weights(source)


@pytest.mark.parametrize('place', ['../part-0.safetensors', '/part-0.safetensors', 'a/part-0.safetensors', '..'])
def test_an_index_names_files_beside_it(source, place):
    index = source / 'model.safetensors.index.json'
    index.write_text(index.read_text().replace('part-0.safetensors', place))
    with pytest.raises(WeightsError, match='is no name of a .safetensors file beside it'):
        open_weights(source)


def test_links_within_a_folder_and_those_of_the_hub_are_followed(source, tmp_path):
    moved(source, 'part-0.safetensors', source / 'files' / 'a')
    assert len(open_weights(source).specs) == 44
    cache = tmp_path / 'models--someone--something'
    (cache / 'snapshots').mkdir(parents=True)
    source = Path(shutil.copytree(source, cache / 'snapshots' / 'abc123', symlinks=False))
    for name in ('part-0.safetensors', 'part-1.safetensors', 'config.json'):
        moved(source, name, cache / 'blobs' / name)
    assert len(open_weights(source).specs) == 44
    moved(source, 'model.safetensors.index.json', cache / 'refs' / 'index')  # beside the blobs, and none of them
    with pytest.raises(WeightsError, match='a link that leads out of its folder'):
        open_weights(source)


def test_a_link_that_the_user_names_is_followed(source, tmp_path):
    (tmp_path / 'link').symlink_to(source)
    assert len(open_weights(tmp_path / 'link').specs) == 44


def rewritten(folder, change):
    """network.json changed by someone who knows of its digest."""
    record = json.loads((folder / 'network.json').read_text())
    change(record)
    del record['sha256']
    record['sha256'] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / 'network.json').write_text(json.dumps(record))


@pytest.fixture(scope='module')
def imported_once(tmp_path_factory, request):
    sys.path.insert(0, str(ROOT / 'tests' / 'weights'))
    from tiny_dit import CONFIG, draw

    sys.path.pop(0)
    folder = tmp_path_factory.mktemp('imported')
    (folder / 'source').mkdir()
    save_file(draw(np.float16), folder / 'source' / 'model.safetensors')
    (folder / 'source' / 'config.json').write_text(json.dumps(CONFIG))
    return import_source(folder / 'source', folder / 'imported')


@pytest.fixture
def imported(imported_once, tmp_path):
    return Path(shutil.copytree(imported_once, tmp_path / 'imported'))


def a_parameter(record, **changes):
    record['parameters']['final/bias'] |= changes


RECORDS = {
    'another network': (lambda r: r['network'].update(name='as_model'), 'network is'),
    'no network': (lambda r: r.update(network=None), 'network is None'),
    'class': (lambda r: r.update(class_name='Strange'), 'class_name is Strange'),
    'class list': (lambda r: r.update(class_name=[]), r'class_name is \[\]'),
    'input': (lambda r: r.update(input=3), 'input is 3'),
    'source': (lambda r: r.update(source=3), 'source is 3'),
    'dtypes': (lambda r: r.update(dtypes={'most': 'X', 'others': {}}), 'dtypes is'),
    'no parameters': (lambda r: r.update(parameters=[]), r'parameters is \[\]'),
    'up': (lambda r: r['parameters'].update({'..': r['parameters'].pop('final/bias')}), 'parameters is'),
    'out': (lambda r: r['parameters'].update({'/etc/x': r['parameters'].pop('final/bias')}), 'parameters is'),
    'shape': (lambda r: a_parameter(r, shape='x'), 'parameters is'),
    'dtype': (lambda r: a_parameter(r, dtype='O'), 'parameters is'),
    'size': (lambda r: a_parameter(r, shape=[2**40]), 'final/bias is damaged'),
    'option': (lambda r: r['network'].update(strange=1), "unexpected keyword argument 'strange'"),
}


@pytest.mark.parametrize('name', RECORDS)
def test_an_imported_folder_is_not_believed(imported, name):
    change, message = RECORDS[name]
    rewritten(imported, change)
    with pytest.raises(WeightsError, match=message) as caught:
        load(imported)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('fields', [{'shape': [2**50], 'chunks': [2**50]}, {'chunks': [2**50, 1]}, {'dtype': '|O'}])
def test_an_array_asks_for_no_more_memory_than_it_has(imported, fields):
    """The process would not survive it: the library beneath ends it where there is no memory."""
    path = imported / 'params' / 'final.bias' / '.zarray'
    layout = json.loads(path.read_text()) | fields
    layout['chunks'] = layout['chunks'][: len(layout['shape'])]
    path.write_text(json.dumps(layout))
    with pytest.raises(WeightsError, match='final/bias (is damaged|cannot be read)'):
        load(imported)


def test_an_imported_array_stays_in_its_folder(imported, tmp_path):
    moved(imported / 'params', 'final.bias', tmp_path / 'elsewhere')
    with pytest.raises(WeightsError, match='a link that leads out of its folder'):
        load(imported)
