"""What accelerators can do at their best, from their datasheets; of the machine at hand, by measuring it.

Bandwidths of links are one-way, half of what datasheets give: what a device can send with all its links working. Those
of a TPU form a torus, of which a ring over one axis uses two, and in small slices a mesh.
"""

import os
import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    flops_16: float  # FLOP/s of dense matrix products in bfloat16
    flops_32: float  # of those of float32 arrays, at JAX's default precision: bfloat16 on TPUs, TF32 on GPUs
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    link: float  # bytes/s that it can send to devices of its domain
    domain: int  # so many devices are joined by fast links
    network: float  # bytes/s to any others: its share of the network cards of its host

    def flops(self, dtype: str) -> float:
        """FLOP/s of products of arrays of a dtype, in the program text's spelling."""
        return self.flops_16 if dtype in ('bf16', 'f16') or dtype.startswith('f8') else self.flops_32


DEVICES = {
    device.name: device
    for device in (
        # cloud.google.com/tpu/docs/v4: 275 TFLOPS, 32 GiB at 1200 GB/s, 4096 chips in a pod. Jouppi et al. 2023, "TPU
        # v4": 6 links of 50 GB/s. Hosts of four chips with 200 Gbit/s.
        Device(
            name='v4',
            flops_16=275e12,
            flops_32=275e12,
            memory=32 * 2**30,
            bandwidth=1200e9,
            link=300e9,
            domain=4096,
            network=6.25e9,
        ),
        # cloud.google.com/tpu/docs/v5e: 197 TFLOPS, 16 GB at 819 GB/s, links of 400 GB/s both ways, 256 chips in a pod,
        # the pod's network 6.4 Tbit/s.
        Device(
            name='v5e',
            flops_16=197e12,
            flops_32=197e12,
            memory=16e9,
            bandwidth=819e9,
            link=200e9,
            domain=256,
            network=3.125e9,
        ),
        # cloud.google.com/tpu/docs/v5p: 459 TFLOPS, 95 GB at 2765 GB/s, links of 4800 Gbit/s, slices up to 6144 chips.
        # Hosts of four chips with 200 Gbit/s.
        Device(
            name='v5p',
            flops_16=459e12,
            flops_32=459e12,
            memory=95e9,
            bandwidth=2765e9,
            link=600e9,
            domain=6144,
            network=6.25e9,
        ),
        # cloud.google.com/tpu/docs/v6e: 918 TFLOPS, 32 GB at 1638 GB/s, links of 800 GB/s both ways, 256 chips in a
        # pod. Hosts of eight chips with 800 Gbit/s.
        Device(
            name='v6e',
            flops_16=918e12,
            flops_32=918e12,
            memory=32e9,
            bandwidth=1638e9,
            link=400e9,
            domain=256,
            network=12.5e9,
        ),
        # NVIDIA A100 datasheet, SXM, 80 GB: 312 TFLOPS (TF32 156), 2039 GB/s, NVLink 600 GB/s both ways. DGX A100:
        # eight GPUs with a network card of 200 Gbit/s each.
        Device(
            name='A100',
            flops_16=312e12,
            flops_32=156e12,
            memory=80e9,
            bandwidth=2039e9,
            link=300e9,
            domain=8,
            network=25e9,
        ),
        # NVIDIA H100 datasheet, SXM, of which dense rates are half of those with sparsity: 989 TFLOPS (TF32 494), 80 GB
        # at 3.35 TB/s, NVLink 900 GB/s both ways. DGX H100: eight GPUs with 400 Gbit/s each.
        Device(
            name='H100',
            flops_16=989e12,
            flops_32=494e12,
            memory=80e9,
            bandwidth=3350e9,
            link=450e9,
            domain=8,
            network=50e9,
        ),
        # NVIDIA H200 datasheet, SXM: as the H100, with 141 GB at 4.8 TB/s.
        Device(
            name='H200',
            flops_16=989e12,
            flops_32=494e12,
            memory=141e9,
            bandwidth=4800e9,
            link=450e9,
            domain=8,
            network=50e9,
        ),
    )
}
MEASURED = 'cpu'  # the name of the machine at hand
MATMUL, COPY, TRIALS = 1024, 2**25, 8  # edge of the square matrices, values copied, of which the best time counts


def find_device(name: str, num_devices: int) -> Device:
    """By its name; `cpu` is measured, as one of `num_devices` that share the machine. Raises ValueError for no name."""
    if name.lower() == MEASURED:
        return measure_cpu(num_devices)
    known = {known.lower(): device for known, device in DEVICES.items()}
    if name.lower() not in known:
        raise ValueError(f'--device={name}: unknown device; there are {", ".join([*DEVICES, MEASURED])}')
    return known[name.lower()]


def measure_cpu(num_devices: int) -> Device:
    """The machine at hand, shared evenly: a float32 matrix product and a copy, each the best of a few."""
    import jax
    import jax.numpy as jnp

    def seconds(function, *arguments):
        run, times = jax.jit(function), []
        jax.block_until_ready(run(*arguments))
        for _ in range(TRIALS):
            began = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times.append(time.perf_counter() - began)
        return min(times)

    square, long = jnp.ones((MATMUL, MATMUL)), jnp.ones(COPY)
    flops = 2 * MATMUL**3 / seconds(jnp.matmul, square, square) / num_devices
    bandwidth = 2 * long.nbytes / seconds(lambda x: x + 1, long) / num_devices
    return Device(
        name=MEASURED,
        flops_16=flops,  # which it computes in float32
        flops_32=flops,
        memory=os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / num_devices,
        bandwidth=bandwidth,
        link=bandwidth / 2,  # a copy
        domain=num_devices,
        network=bandwidth / 2,
    )
