"""Networks: Flax modules, arrays in and arrays out. They know nothing of schedules, losses or sampling.

Every network is called the same way, `network(x, t, cond, *, deterministic=True)`, and returns float32:

    x     [B, ..., C]     the input as the parameterization scales it
    t     [B]             the time as the parameterization scales it (0..1000 for published weights)
    cond  int32 [B]       class labels; `num_classes` itself is the null label of classifier-free guidance;
                          None where `num_classes == 0`

What stands in `__all__` is what a config can choose by name; `as_model` makes pure functions of a module.
"""

from diffjax.nets.autoencoder import Autoencoder as Autoencoder
from diffjax.nets.dit import DiT
from diffjax.nets.edm2 import EDM2
from diffjax.nets.flux import Flux
from diffjax.nets.i3d import I3D as I3D
from diffjax.nets.inception import Inception as Inception
from diffjax.nets.inflation import inflate as inflate
from diffjax.nets.inflation import stylised as stylised
from diffjax.nets.mlp import MLP
from diffjax.nets.mmdit import MMDiT
from diffjax.nets.model import as_model as as_model
from diffjax.nets.model import count_parameters as count_parameters
from diffjax.nets.pixart import PixArt
from diffjax.nets.space_time_unet import SpaceTimeUNet
from diffjax.nets.unet import UNet
from diffjax.nets.uvit import UViT
from diffjax.nets.vgg import LPIPS as LPIPS
from diffjax.nets.video_dit import VideoDiT

__all__ = ['DiT', 'EDM2', 'Flux', 'MMDiT', 'PixArt', 'UNet', 'UViT', 'SpaceTimeUNet', 'VideoDiT', 'MLP']
