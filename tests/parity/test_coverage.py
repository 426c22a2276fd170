"""Every solver of ours stands beside a reference, or it is said why not."""

import test_diffusers
import test_kdiffusion

from diffjax.core import solvers

NO_REFERENCE = {
    'euler_maruyama': 'diffusers has it for its SDE-VE alone; held to the exact marginals',
    'repaint': "diffusers' RePaintScheduler is an inpainting mask and ddpm's step in one",
    'restart': 'in neither package',
    'rk4': 'in neither package',
}


def test_no_solver_is_left_out():
    covered = {case.ours for module in (test_diffusers, test_kdiffusion) for case in module.CASES}
    assert covered | set(NO_REFERENCE) == set(solvers.__all__) and not covered & set(NO_REFERENCE)
