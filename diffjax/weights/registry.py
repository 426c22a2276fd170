"""Every covered architecture. A new one is a file with its `ARCHITECTURE`, and a line here."""

from diffjax.weights import autoencoder, dit, flux, mmdit, pixart, unet, unet_text

ARCHITECTURES = {  # by the class name in a config.json
    architecture.class_name: architecture
    for architecture in (
        dit.ARCHITECTURE,
        dit.ORIGINAL,
        mmdit.ARCHITECTURE,
        flux.ARCHITECTURE,
        pixart.ARCHITECTURE,
        unet.ARCHITECTURE,
        unet_text.ARCHITECTURE,
        autoencoder.KL,
        autoencoder.VQ,
    )
}
OLDER_NAMES = {  # of classes that diffusers has split: (class name, norm_type) -> class name now
    ('Transformer2DModel', 'ada_norm_zero'): 'DiTTransformer2DModel',
    ('Transformer2DModel', 'ada_norm_single'): 'PixArtTransformer2DModel',
}
OLDER_ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}
"""Layers of `attentions.0` and so on, as diffusers wrote them in 2022; the files of DDPM and of SD's VAE still do."""
