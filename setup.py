"""Packaging of diffjax: metadata and dependencies. Settings of tools stand in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

GCS = ['gcsfs>=2026.10.1', 'google-cloud-storage>=3.17.1']  # the second for Orbax
VIDEO = ['imageio-ffmpeg>=0.6.0']
TEST = ['pytest>=9.2.0', 'pytest-xdist>=3.8.0', 'hypothesis>=6.170.15', 'ruff>=0.17.5', 'safetensors>=0.8.0']

setup(
    name='diffjax',
    version='0.1.0',
    description='A functional research codebase for diffusion and flow models in JAX',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['diffjax', 'diffjax.*']),
    package_data={'diffjax.weights': ['*.safetensors']},
    install_requires=[
        'absl-py>=2.5.1',
        'array_record>=0.8.6',
        'chex>=0.1.92',
        'diffrax>=0.7.2',
        'etils[epath]>=1.15.0',
        'flax>=0.12.8',
        'grain>=0.2.18',
        'importlib_resources>=7.1.0',  # tensorflow-datasets uses it and does not say so
        'jax>=0.10.2',
        'matplotlib>=3.11.2',
        'ml-collections>=1.1.0',
        'ml_dtypes>=0.6.0',
        'numpy>=2.4.6',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.8',
        'pillow>=13.0.0',
        'scikit-learn>=1.9.1',
        'scipy>=1.17.1',
        'tensorboardX>=2.6.5',
        'tensorflow-datasets>=4.9.10',
        'tensorstore>=0.1.86',
        'tqdm>=4.70.1',
    ],
    extras_require={
        'test': TEST + GCS + VIDEO,
        'gcs': GCS,  # checkpoints in a bucket: training.checkpoints=gs://...
        'video': VIDEO,  # samples as MP4
        'cuda12': ['jax[cuda12]>=0.10.2'],
        'cuda13': ['jax[cuda13]>=0.10.2'],
        'tpu': ['jax[tpu]>=0.10.2'],
        'parity': [  # tests/parity
            'torch==2.13.0',
            'diffusers>=0.42.0',
            'transformers>=5.23.0',
            'torchdiffeq>=0.2.5',
            'torchsde>=0.2.6',
        ],
    },
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
