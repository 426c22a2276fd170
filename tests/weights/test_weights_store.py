"""Imported folders: what is written comes back, whole or not at all; damage is seen; memory holds one tensor."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file
from tiny_dit import CONFIG, draw

from diffjax.nets import DiT
from diffjax.weights import WeightsError, import_tensors, load
from diffjax.weights.__main__ import main
from diffjax.weights.dit import ARCHITECTURE
from diffjax.weights.engine import expected_shapes
from diffjax.weights.export import export_folder
from diffjax.weights.folders import appearing
from diffjax.weights.store import import_source, read_record
from diffjax.weights.tensors import DTYPES, Spec, TensorWriter

DRAWN = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def old_handlers():
    """The command handles signals; tests leave that as it was."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def imported(source, tmp_path):
    return import_source(source, tmp_path / 'imported')


def same_files(folder, tensors):
    """Every tensor of the safetensors files in a folder, read by their library, bit for bit."""
    found = {}
    for file in folder.glob('*.safetensors'):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    for name, a in tensors.items():
        assert found[name].dtype == a.dtype and found[name].shape == a.shape and found[name].tobytes() == a.tobytes()


def test_what_was_imported_loads(imported, tensors):
    weights = load(imported)
    assert weights.network == DiT(**{key: value for key, value in weights.record['network'].items() if key != 'name'})
    options = ARCHITECTURE.to_options(CONFIG)
    expected = import_tensors(ARCHITECTURE, options, tensors)
    assert jax.tree.structure(weights.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, weights.params, expected)
    assert jax.tree.leaves(weights.params)[0].dtype == np.float32
    out = jax.eval_shape(weights.network.apply, {'params': weights.params}, *ARCHITECTURE.inputs(options))
    assert out.shape == (1, 4, 4, 4)
    assert weights.record['source']['config'] == CONFIG
    assert sorted(path.name for path in imported.iterdir()) == ['network.json', 'params']


@pytest.mark.parametrize('kind', DRAWN)
@pytest.mark.parametrize('dtype', ['float32', None])
def test_the_way_there_and_back_is_exact(write_folder, tmp_path, kind, dtype):
    tensors = draw(DRAWN[kind])
    odd = 'proj_out_1.bias'  # one that is not like the others
    tensors[odd] = tensors[odd].astype(np.float32 if kind == 'float16' else np.float16)
    imported = import_source(write_folder(tensors), tmp_path / 'imported', dtype=dtype)
    kept = load(imported).params['blocks_0']['mlp_in']['kernel'].dtype
    assert kept == (DRAWN[kind] if dtype is None else np.float32)
    out = export_folder(imported, tmp_path / 'exported')
    same_files(out, tensors)
    assert json.loads((out / 'config.json').read_text())['_class_name'] == 'DiTTransformer2DModel'


def test_shards(imported, tensors, tmp_path):
    out = export_folder(imported, tmp_path / 'exported', shard_bytes=20_000)
    index = json.loads((out / 'diffusion_pytorch_model.safetensors.index.json').read_text())
    files = sorted(file.name for file in out.glob('*.safetensors'))
    assert len(files) > 2 and files[0] == f'diffusion_pytorch_model-00001-of-{len(files):05}.safetensors'
    assert index['metadata']['total_size'] == sum(a.nbytes for a in tensors.values())
    assert all(tensor in load_file(out / name) for tensor, name in index['weight_map'].items())
    assert all(sum(a.nbytes for a in load_file(out / name).values()) <= 20_000 for name in files)
    same_files(out, tensors)


def test_an_older_name_is_exported_under_the_newer(write_folder, tensors, tmp_path):
    source = write_folder(tensors, config=CONFIG | {'_class_name': 'Transformer2DModel', 'num_vector_embeds': None})
    out = export_folder(import_source(source, tmp_path / 'imported'), tmp_path / 'exported')
    assert json.loads((out / 'config.json').read_text()) == ARCHITECTURE.to_config(ARCHITECTURE.to_options(CONFIG))


# Failures -------------------------------------------------------------------------------------------------------------


def test_a_failed_import_leaves_nothing(write_folder, tensors, tmp_path):
    name = 'transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias'
    source = write_folder(tensors | {name: tensors[name] + 1})  # differs from its copy, which only reading tells
    with pytest.raises(WeightsError, match='should hold the same values'):
        import_source(source, tmp_path / 'there' / 'imported')
    assert list((tmp_path / 'there').iterdir()) == []


def test_a_full_disk_is_one_line(source, tmp_path):
    """Files may not grow beyond 2 kB: what tensorstore says of it becomes an error of ours, and nothing is left."""
    resource = pytest.importorskip('resource')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with pytest.raises(WeightsError, match='cannot be written: ') as caught:
            import_source(source, tmp_path / 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert '\n' not in str(caught.value) and not (tmp_path / 'out').exists()


def test_what_is_there_is_never_written_over(source, imported, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in imported.rglob('*')}
    with pytest.raises(WeightsError, match='imported is there already; give another --out'):
        import_source(source, imported)
    (tmp_path / 'a').write_text('precious')
    with pytest.raises(WeightsError, match='is there already'):
        export_folder(imported, tmp_path / 'a')
    assert before == {path: path.stat().st_mtime_ns for path in imported.rglob('*')}
    with pytest.raises(WeightsError, match='is there already'), appearing(tmp_path / 'b'):
        (tmp_path / 'b').mkdir()  # by somebody else, meanwhile
    assert list(tmp_path.glob('.*')) == []


def hang(out):
    with appearing(out) as folder:
        (folder / 'half').write_text('')
        time.sleep(60)


def test_what_a_killed_process_leaves_is_removed(tmp_path):
    out = tmp_path / 'out'
    process = multiprocessing.get_context('spawn').Process(target=hang, args=(out,))
    process.start()
    while not list(tmp_path.glob('.out.part-*/half')):
        assert process.is_alive()
        time.sleep(0.05)
    with appearing(out) as folder:  # a second writer does not disturb the first
        assert len(list(tmp_path.glob('.out.part-*'))) == 2
        (folder / 'mine').write_text('')
    assert len(list(tmp_path.glob('.out.part-*/half'))) == 1
    process.kill()
    process.join()
    assert len(list(tmp_path.glob('.out.part-*'))) == 1
    shutil.rmtree(out)
    with pytest.raises(KeyError), appearing(out):  # the next one clears up
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


def test_damage_is_seen(imported, tmp_path, capfd):
    files = [path for path in (imported / 'params').rglob('*') if path.is_file() and path.name[0] in '0123456789']
    largest = max(files, key=lambda path: path.stat().st_size)
    for place in (0, 1001, -1):
        flip(largest, place)
        with pytest.raises(WeightsError, match='is damaged: it is not what was written'):
            load(imported)
        with pytest.raises(WeightsError, match='is damaged'):
            export_folder(imported, tmp_path / 'exported')
        assert not (tmp_path / 'exported').exists()
        flip(largest, place)
    load(imported)
    os.truncate(largest, 10)
    assert main(['export', str(imported), f'--out={tmp_path / "exported"}']) == 2
    told = capfd.readouterr().err  # of the file descriptor: what libraries print counts
    assert told.startswith(f'error: {imported}') and 'cannot be read' in told and told.count('\n') == 1
    shutil.rmtree(largest.parent)
    with pytest.raises(WeightsError, match='cannot be read'):
        load(imported)


def test_the_parameters_are_an_orbax_checkpoint(imported):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(imported / 'params')
    jax.tree.map(np.testing.assert_array_equal, tree, load(imported).params)
    assert jax.tree.structure(tree) == jax.tree.structure(load(imported).params)


def test_a_changed_record_is_seen(imported, tmp_path):
    path = imported / 'network.json'
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {'network': record['network'] | {'num_heads': 4}}))
    with pytest.raises(WeightsError, match='it has been changed since it was written'):
        read_record(imported)
    path.write_text(json.dumps({'network': {}}))
    with pytest.raises(WeightsError, match="it has the keys 'network' instead of network, input"):
        read_record(imported)
    with pytest.raises(WeightsError, match='no network.json in it; python -m diffjax.weights import'):
        load(tmp_path)


def test_a_network_that_diffusers_has_no_settings_for(imported):
    path = imported / 'network.json'
    record = json.loads(path.read_text())
    record['network']['frequency_shift'] = 0
    del record['sha256']
    record['sha256'] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(record))
    with pytest.raises(WeightsError, match='DiTTransformer2DModel has no settings for this network'):
        export_folder(imported, imported.parent / 'exported')


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command(source, tensors, tmp_path, capsys):
    words = [sys.executable, '-m', 'diffjax.weights', 'import', source, f'--out={tmp_path / "dir"}']
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'DiTTransformer2DModel, 44 tensors, 0.1 MB, float32' in done.stdout
    assert 'DiT(patch_size=2, hidden_size=16' in done.stdout
    assert done.stderr == ''
    assert main(['export', str(tmp_path / 'dir'), f'--out={tmp_path / "out"}', '--shard_size=20KB']) == 0
    same_files(tmp_path / 'out', tensors)
    capsys.readouterr()
    assert main(['import', str(tmp_path / 'nowhere'), f'--out={tmp_path / "x"}']) == 2
    told = capsys.readouterr()
    assert told.out == '' and told.err == f'error: {tmp_path / "nowhere"}: there is nothing of that name\n'


def test_the_commands_that_only_look(source, imported, capsys, write_folder, tensors):
    assert main(['list']) == 0
    assert 'DiTTransformer2DModel        DiT   (also Transformer2DModel with norm_type' in capsys.readouterr().out
    assert main(['inspect', str(source)]) == 0
    assert 'every tensor has the name and shape of the table' in capsys.readouterr().out
    assert main(['inspect', str(imported)]) == 0
    assert f'DiTTransformer2DModel from {source}' in capsys.readouterr().out
    short = write_folder({name: a for name, a in tensors.items() if name != 'proj_out_1.bias'}, name='short')
    assert main(['inspect', str(short)]) == 2
    assert '1 missing: proj_out_1.bias' in capsys.readouterr().err
    for size in ('0', '5XB', 'many'):
        with pytest.raises(SystemExit):
            main(['export', 'a', '--out=b', f'--shard_size={size}'])
        assert 'a size is written 5GB' in capsys.readouterr().err


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_an_import_leaves_nothing(source, tmp_path, number):
    script = (
        'import sys, time; from diffjax.weights import store; from diffjax.weights.__main__ import main\n'
        'store._digest = lambda a: time.sleep(0.5)\nsys.exit(main(sys.argv[1:]))'
    )
    words = [sys.executable, '-c', script, 'import', str(source), f'--out={tmp_path / "o" / "dir"}']
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob('o/.dir.part-*/params*')):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f'error: stopped by {number.name}, and nothing was written\n'
    assert list((tmp_path / 'o').iterdir()) == []


# Memory ---------------------------------------------------------------------------------------------------------------


def peaks_of(*commands):
    """MB that one process held at most after each of some commands."""
    script = (
        'import resource; from diffjax.weights.__main__ import main\n'
        f'for words in {commands!r}:\n'
        '    assert main(words) == 0\n'
        "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)"
    )
    # What is freed goes back at once: the allocator's own stock would blur the picture.
    env = os.environ | {'MALLOC_MMAP_THRESHOLD_': '65536'}
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith('peak')]


def big(folder, depth, width):
    """A DiT of `depth` blocks of width 72 * `width` in a folder; (bytes of all tensors, of the largest)."""
    config = CONFIG | {'num_attention_heads': width, 'attention_head_dim': 72, 'num_layers': depth}
    shapes = expected_shapes(ARCHITECTURE, ARCHITECTURE.to_options(config))
    specs = {name: Spec(shape, DTYPES['F32']) for name, shape in shapes.items()}
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    with TensorWriter(folder / 'model.safetensors', specs) as writer:
        for name, shape in shapes.items():
            writer.write(name, np.full(shape, 0.5, np.float32))
    sizes = [spec.num_bytes for spec in specs.values()]
    return sum(sizes) / 1e6, max(sizes) / 1e6


@pytest.mark.parametrize(
    ('depth', 'width'), [(8, 6), pytest.param(6, 20, marks=pytest.mark.slow, id='1 GB, of which the largest 50 MB')]
)
def test_memory_stays_near_the_largest_tensor(source, tmp_path, depth, width):
    total, largest = big(tmp_path / 'large', depth, width)
    names = {name: str(tmp_path / name) for name in ('tiny', 'tiny_out', 'large', 'dir', 'out')}
    _, least, there, back = peaks_of(
        ['import', str(source), f'--out={names["tiny"]}'],
        ['export', names['tiny'], f'--out={names["tiny_out"]}'],
        ['import', names['large'], f'--out={names["dir"]}'],
        ['export', names['dir'], f'--out={names["out"]}', '--shard_size=40MB'],
    )
    print(
        f'{total:.0f} MB, largest {largest:.1f}: import {there - least:.0f}, export {back - least:.0f} over a tiny one'
    )
    assert total > 15 * largest
    assert max(there, back) - least < 3 * largest + 15


def test_the_fixture_is_what_the_library_would_write(source, tensors, tmp_path):
    save_file(tensors, tmp_path / 'a.safetensors')
    assert (tmp_path / 'a.safetensors').read_bytes() == (source / 'diffusion_pytorch_model.safetensors').read_bytes()
