"""Seconds of the collectives of one rank.

A ring moves (n - 1) / n of the message per rank (Thakur et al., Optimization of Collective Communication Operations in
MPICH, section 4). Ranks are numbered tp fastest, then cp, dp, pp, as megatron-core does, so a group's neighbours share
a server while its stride allows. A group that spans servers uses the network ports of all its members in a server.
All groups of an axis work at once, so the one that lies worst counts.
"""

from math import gcd

from megabagel.planner.calibration import Calibration
from megabagel.planner.memory import stage_numbers
from megabagel.planner.scenario import Case


def bandwidth(case: Case, constants: Calibration, size: int, stride: int) -> float:
    """Bytes per second per rank of a group of `size` ranks that lie `stride` apart, one of the groups side by side that
    make up the job.

    Of the places that a server has at this stride, the groups take `size` after `size`: every group stays within a
    server if `size` divides them, else some group has no more than their greatest common divisor in one of its servers.
    """
    gpu = case.gpu
    places = 1 if gpu.gpus_per_node % stride else gpu.gpus_per_node // stride
    together = size if case.grid.gpus <= gpu.gpus_per_node else gcd(size, places)
    if together == size:
        return gpu.nvlink_gb_s * 1e9 * constants.link
    return min(gpu.nvlink_gb_s, together * gpu.network_gb_s) * 1e9 * constants.link


def collective(case: Case, constants: Calibration, size: int, stride: int, message: float) -> float:
    """An all-gather or reduce-scatter whose whole tensor has `message` bytes; the time that latency takes grows with
    the logarithm of the group."""
    if size == 1:
        return 0.0
    wire = (size - 1) / size * message / bandwidth(case, constants, size, stride)
    return wire + constants.latency * max(1, (size - 1).bit_length())


def tensor_parallel(case: Case, constants: Calibration) -> tuple[float, float]:
    """(forward, backward) of one decoder layer: 4 collectives of R h forward, 6 backward of which megatron-core runs
    the 2 that gather inputs for weight gradients beside the other product. Recomputation repeats the forward ones."""
    message = case.load.rows * case.config.model.hidden * case.bytes
    one = collective(case, constants, case.grid.tp, 1, message)
    exposed = 1 - constants.hidden if case.system.overlaps_tensor else 1.0
    return 4 * one * exposed, (4 + 4 * case.full_layers) * one * exposed


def context_parallel(case: Case, constants: Calibration) -> tuple[float, float]:
    """(forward, backward) of one decoder layer: K and V gathered, their gradients reduced and scattered."""
    message = 2 * case.load.keys * case.k * case.bytes
    one = collective(case, constants, case.grid.cp, case.grid.tp, message)
    again = 1.0 if case.grid.recompute == "selective" else case.full_layers
    return one, one * (1 + again)


def wire(case: Case, constants: Calibration) -> float:
    """A micro-batch's hidden states from one stage to the next; interleaving hides it behind other chunks."""
    if case.grid.pp == 1 or case.grid.vpp > 1:
        return 0.0
    message = case.split_rows * case.config.model.hidden * case.bytes
    gpu = case.gpu
    link = gpu.nvlink_gb_s if case.grid.gpus <= gpu.gpus_per_node else gpu.network_gb_s  # the border that lies worst
    return message / (link * 1e9 * constants.link) + constants.latency


def data_parallel(case: Case, constants: Calibration, rank: int, beside: float) -> float:
    """Gradients scattered (fp32) and weights gathered over the replicas, once per step, on one pipeline rank.

    A system that overlaps can hide it behind the micro-batch that makes the last gradients, `beside` seconds; with
    interleaving the chunks end one after the other, over the last pp micro-batches. FSDP gathers weights twice and
    reduces gradients once per micro-batch.
    """
    pp, vpp = case.grid.pp, case.grid.vpp
    numbers, size, stride = stage_numbers(case, rank), case.grid.replicas, case.grid.tp
    weights = collective(case, constants, size, stride, case.bytes * numbers.learning)
    gradients = collective(case, constants, size, stride, 4 * numbers.learning)
    if case.system.shards_weights:
        return max(0.0, case.micro_batches * (2 * weights + gradients) - beside * case.micro_batches)
    hidden = beside * (pp if vpp > 1 else 1) if case.system.overlaps_data else 0.0
    return max(0.0, weights + gradients - hidden)
