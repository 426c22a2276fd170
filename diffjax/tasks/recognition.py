"""Learning to recognise what a picture or a clip shows: the network whose features then measure others.

With logits l [Q] for the questions of yes or no, m [K] for the choice, and answers y, c the loss of one is

    sum_q (log(1 + e^l_q) - y_q l_q)  +  w (log sum_k e^m_k - m_c)                                                  (1)

at w = 1 the negative log-likelihood of all answers, each independent given what is seen, in nats.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, PyTree
from diffjax.nets.recognizer import ClipRecognizer, Recognizer
from diffjax.tasks.questions import Answers, Classes, Flights, Plays, Scenes
from diffjax.tasks.task import Task

__all__ = ['Recognition']


@dataclass(frozen=True, kw_only=True)
class Recognition(Task):
    """A recogniser trained on (1). A batch holds `x0: [B, H, W, C]` or `[B, T, H, W, C]`, and what the questions read.

    choice_weight: w of (1); there are many questions of yes or no, and one choice.
    """

    network: Recognizer | ClipRecognizer
    questions: Scenes | Classes | Flights | Plays
    choice_weight: float = 1.0

    def __post_init__(self):
        if not self.choice_weight >= 0:
            raise ValueError(f'choice_weight must be at least 0, got {self.choice_weight}')
        needed = self.questions.num_questions + self.questions.num_choices
        if (given := self.network.num_outputs) != needed:
            raise ValueError(f'these questions take {needed} outputs of the network, which has {given}')

    def init(self, key, batch):
        return self.network.init(key, batch['x0'][:1])['params'], ()

    def loss(self, params, task_state, frozen, batch, step, keys):
        answers, (yes, choice) = self.questions(batch), self.logits(params, batch['x0'])
        each = (jax.nn.softplus(yes) - answers.yes * yes).sum(-1).mean()
        chosen = jnp.take_along_axis(choice, answers.choice[:, None], -1)[:, 0]
        one = (jax.nn.logsumexp(choice, -1) - chosen).mean()
        metrics = {'yes_or_no': each, 'choice': one}
        return each + self.choice_weight * one, (task_state, metrics)

    def logits(self, params: PyTree, x: Array) -> tuple[Array, Array]:
        """[B, Q] and [B, K]."""
        return jnp.split(self.network.apply({'params': params}, x), [self.questions.num_questions], -1)

    def answer(self, params: PyTree, x: Array) -> Answers:
        """What is likelier than not, and the likeliest choice."""
        yes, choice = self.logits(params, x)
        return Answers((yes > 0).astype(jnp.float32), choice.argmax(-1).astype(jnp.int32))
