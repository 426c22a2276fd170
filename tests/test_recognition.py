"""Recognisers from a config: what is built, refused, trained, measured and written; and the one in the package."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from sklearn.metrics import f1_score

from diffjax.data import make_iterator, open_source
from diffjax.data.moving_digits import moving_digits_dataset_builder
from diffjax.data.moving_shapes import moving_shapes_dataset_builder
from diffjax.data.shapes import shapes_dataset_builder
from diffjax.data.shapes.rendering import draw
from diffjax.data.shapes.scenes import CLASSES, scene
from diffjax.kinds import kind_of
from diffjax.recognition import answer_figures, build_recognition, f1, measure
from diffjax.restoring import restore_params
from diffjax.tasks import Recognition
from diffjax.tasks.questions import Answers, Classes, Flights, Scenes
from diffjax.training.loop import train
from diffjax.weights.recognizer import open_recognizer

pytestmark = pytest.mark.usefixtures('fast_compilation')
SCENES = Scenes(num_shapes=4, num_colors=6, num_sizes=3, max_objects=4)


@pytest.fixture
def smoke(get_config):
    return get_config('recognizer_shapes', 'smoke').to_dict()


@pytest.fixture(scope='module')
def few_shapes(tmp_path_factory):
    """A folder with the shapes, of which there are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes_dataset_builder, 'NUM_EXAMPLES', {'train': 20, 'test': 12})
        directory = tmp_path_factory.mktemp('shapes')
        open_source('shapes', 'train', data_dir=directory)
    return directory


@pytest.fixture
def scenes(get_config, few_shapes, changed):
    """The whole config, on few scenes, its network shrunk."""
    config = changed(get_config('recognizer_shapes').to_dict(), 'dataset.data_dir', str(few_shapes))
    config['network'] |= {'channels': (8, 8), 'num_groups': 2}
    config['training'] |= {'num_steps': 3, 'batch_size': 8, 'log_every_steps': 1, 'checkpoint_every_steps': 3}
    config['optimizer']['warmup_steps'] = 1
    config['evaluation'] |= {'num_samples': 5, 'batch_size': 4}
    return config


def trained(config, workdir):
    run = build_recognition(config)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp'))
    run = replace(run, mesh=mesh)
    batches = make_iterator(run.source, batch_size=run.training.batch_size, seed=0)
    assert train(run.trainer(), batches, workdir, announce=lambda text: None).step == run.training.num_steps
    params, step = restore_params(run, workdir)
    return run, params, measure(run, params, workdir, step)


def test_the_config_is_plain_data(get_config):
    for argument in ('', 'smoke'):
        config = get_config('recognizer_shapes', argument).to_dict()
        assert json.loads(json.dumps(config))['task']['name'] == 'recognition'
        assert kind_of(config).build is build_recognition
    with pytest.raises(ValueError, match="takes the argument smoke or none, got 'smok'"):
        get_config('recognizer_shapes', 'smok')


def test_smoke_trains_measures_and_reports(smoke, tmp_path):
    run, params, figures = trained(smoke, tmp_path)
    assert run.task.questions == Classes(num_classes=10)
    test = run.test.read(range(24))
    logits = run.task.network.apply({'params': params}, np.float32(test['image'] / 127.5 - 1))
    assert figures['accuracy'] == (np.asarray(logits).argmax(-1) == test['label']).mean()
    assert json.loads((tmp_path / 'figures.json').read_text()) == figures and figures['step'] == 4
    assert 'digits: a recogniser' in (tmp_path / 'report.md').read_text()
    assert (tmp_path / 'recognised.png').stat().st_size > 500


def test_scenes_are_trained_on_measured_and_left_as_a_file(scenes, tmp_path):
    run, params, figures = trained(scenes, tmp_path)
    assert run.task.questions == SCENES and len(run.source) == 26 and len(run.test) == 6
    assert figures['num_samples'] == 5  # in two batches, the second half full
    said = run.task.answer(params, np.float32(run.test.read(range(5))['image'] / 127.5 - 1))
    things = [scene('test', 6 + i).objects for i in range(5)]
    there = np.array([[any((t.shape, t.color) == divmod(k, 6) for t in what) for k in range(24)] for what in things])
    assert figures['presence_accuracy'] == pytest.approx((np.asarray(said.yes)[:, :24] == there).mean())
    assert figures['count_accuracy'] == pytest.approx(
        (np.asarray(said.choice) == [len(what) for what in things]).mean()
    )
    opened = open_recognizer(tmp_path / 'recognizer.safetensors')
    assert opened.network == run.task.network
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), opened.load(), params)


def test_the_command_knows_the_kind(command, smoke, tmp_path):
    code, out, _ = command('--config=configs/recognizer_shapes.py:smoke', f'--workdir={tmp_path}/w')
    assert code == 0 and 'report.md' in out
    code, _, err = command('--mode=sample', f'--workdir={tmp_path}/w')
    assert code != 0 and '--mode=sample draws from what denoises' in err


@pytest.mark.parametrize('argument', ['smoke', 'shapes,smoke'])
def test_clips_are_trained_on_measured_and_left_as_a_file(get_config, changed, argument, tmp_path, monkeypatch):
    for builder in (moving_digits_dataset_builder, moving_shapes_dataset_builder):
        monkeypatch.setattr(builder, 'NUM_EXAMPLES', {'train': 64, 'test': 24})
    config = get_config('recognizer_clips', argument).to_dict()
    run, params, figures = trained(changed(config, 'dataset.data_dir', str(tmp_path)), tmp_path / 'run')
    known = run.test.read(range(24))
    said = run.task.answer(params, np.float32(known['video'] / 127.5 - 1))
    numbers = (known['position'][:, 0, :, 0] >= 0).sum(-1)
    assert figures['count_accuracy'] == pytest.approx((np.asarray(said.choice) == numbers).mean())
    opened = open_recognizer(tmp_path / 'run' / 'recognizer.safetensors')
    assert opened.network == run.task.network and opened.network.num_frames == 16
    assert (opened.network.num_kinds, opened.in_channels) == ((24, 3) if 'shapes' in argument else (10, 1))
    report = (tmp_path / 'run' / 'report.md').read_text()
    assert 'Held-out clips, their middle frames, and what was recognised' in report
    assert (tmp_path / 'run' / 'recognised.png').stat().st_size > 500


def test_figures_of_clips_are_scikit_learns():
    """Everything right but one aspect."""
    rng, asked = np.random.default_rng(0), Flights(num_frames=3, max_actors=2)
    yes, choice = rng.integers(0, 2, (20, asked.num_questions)), rng.integers(0, 3, 20)
    said = yes.copy()
    said[:, 50:60] = rng.integers(0, 2, (20, 10))  # whether there is one in the second of the frames
    found = answer_figures(asked, Answers(said, choice), Answers(yes, choice))
    presence = [[*range(k, k + 10)] for k in (0, 50, 100)]
    columns = np.ravel(presence)
    expected = f1_score(yes[:, columns].ravel(), said[:, columns].ravel())
    assert expected < 0.99
    assert found == {
        'presence_f1': pytest.approx(expected),
        'position_f1': 1.0,
        'motion_f1': 1.0,
        'count_accuracy': 1.0,
    }
    said = yes.copy()
    said[:, 150:] = 1 - yes[:, 150:]
    assert answer_figures(asked, Answers(said, choice), Answers(yes, choice))['motion_f1'] == 0


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'task.questions': 'scenes'}, "'scenes' are questions about images, and moving_digits has videos here"),
        ({'dataset.num_frames': 4}, "'flights' are questions about whole clips, and moving_digits has them cut here"),
        ({'network.name': 'Recognizer', 'network.temporal_channels': None}, "'flights' wants a ClipRecognizer"),
    ],
)
def test_mistakes_about_clips_are_told(get_config, changed, changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(moving_digits_dataset_builder, 'NUM_EXAMPLES', {'train': 64, 'test': 24})
    config = changed(get_config('recognizer_clips', 'smoke').to_dict(), 'dataset.data_dir', str(tmp_path))
    for key, value in changes.items():
        config = changed(config, key, value)
    with pytest.raises(ValueError, match=message):
        build_recognition(config)


@pytest.mark.parametrize(
    ('key', 'value', 'fragments'),
    [
        ('task.name', 'denoising', ["task: unknown name 'denoising'", 'Recognition']),
        ('task.questions', 'seens', ["task.questions: unknown name 'seens'", 'did you mean Scenes?']),
        ('task.questions', None, ["task 'recognition' needs questions, one of scenes, classes"]),
        ('task.questions', 'scenes', ["'digits' has no annotation 'shape'"]),
        ('task.choice_wait', 1, ["unknown key 'choice_wait'", 'did you mean choice_weight?']),
        ('network.name', 'DiT', ["network: unknown name 'DiT'", 'Recognizer']),
        ('network.num_outputs', 3, ["unknown key 'num_outputs'"]),
        ('network.first_stride', 3, ['first_stride is 1 or 2', 'first_stride=3']),
        ('training.init_from', 'weights/x', ['training.init_from']),
        ('evaluation.params', 'emma', ["'raw' or one of ema; got 'emma'"]),
        ('evaluation.batch_size', 0, ['at least 1', 'and 0']),
        ('sampler', {}, ["unknown key 'sampler'"]),
    ],
)
def test_mistakes_are_told_in_one_line(smoke, changed, key, value, fragments):
    with pytest.raises(ValueError) as caught:
        build_recognition(changed(smoke, key, value))
    assert '\n' not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_scenes_are_not_mirrored(scenes, changed):
    with pytest.raises(
        ValueError, match=r'flip mirrors images and not what is known of them \(centre, color, shape, size\)'
    ):
        build_recognition(changed(scenes, 'dataset.flip', True))


# Figures --------------------------------------------------------------------------------------------------------------


def test_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    said, true = (rng.integers(0, 2, (50, 4)).astype(np.float32) for _ in range(2))
    assert f1(said, true) == pytest.approx(f1_score(true.ravel(), said.ravel()))
    assert f1(0 * said, 0 * true) == 0


def test_each_figure_sees_its_own_questions():
    """Everything right but one aspect, in which everything is wrong."""
    rng = np.random.default_rng(0)
    yes = (rng.random((40, 8, 24)) < 0.3).astype(np.float32)
    choice = rng.integers(0, 5, 40)
    all_right = dict.fromkeys(answer_figures(SCENES, *[Answers(yes.reshape(40, -1), choice)] * 2), 1.0)

    def figures(wrong_aspects, wrong_combinations, shift):
        said = yes.copy()
        said[:, wrong_aspects, wrong_combinations] = 1 - said[:, wrong_aspects, wrong_combinations]
        return answer_figures(
            SCENES, Answers(said.reshape(40, -1), (choice + shift) % 5), Answers(yes.reshape(40, -1), choice)
        )

    everything = slice(None)
    assert figures(slice(0, 0), everything, 0) == all_right
    assert figures(slice(0, 0), everything, 1) == all_right | {'count_accuracy': 0.0}
    assert figures(slice(1, 5), everything, 0) == all_right | {'position_f1': 0.0}
    assert figures(slice(5, 8), everything, 0) == all_right | {'size_f1': 0.0}
    rare = [CLASSES.index(name) for name in ('purple cube', 'green sphere', 'blue cone', 'yellow cylinder')]
    found = figures(0, rare, 0)
    assert found['presence_f1_of_rare_combinations'] == found['scenes_all_right'] == 0
    assert found['presence_accuracy'] == pytest.approx(20 / 24) and found['position_f1'] == found['size_f1'] == 1


# The one in the package -----------------------------------------------------------------------------------------------


def test_the_one_in_the_package_recognises_scenes_it_has_not_seen():
    """Scenes 1000 to 1999 of the test split were held out; 120 of them, rendered here."""
    opened, whats = open_recognizer(), [scene('test', i) for i in range(1000, 1120)]
    task = Recognition(network=opened.network, questions=SCENES)
    x = np.float32(np.stack([draw(what).image for what in whats]) / 127.5 - 1)
    said = jax.jit(task.answer)(opened.load(), x)
    there = np.array([[CLASSES[k] in names_of(what) for k in range(24)] for what in whats])
    known = [k for k in range(24) if divmod(k, 6) not in ((0, 4), (1, 1), (2, 2), (3, 3))]  # of the train split
    assert f1_score(there[:, known].ravel(), np.asarray(said.yes)[:, known].ravel()) > 0.85
    assert (np.asarray(said.choice) == [len(what.objects) for what in whats]).mean() > 0.95


def names_of(what):
    return {CLASSES[t.shape * 6 + t.color] for t in what.objects}
