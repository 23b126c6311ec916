"""Communication model: seconds of the collectives of one rank.

A ring moves (n - 1) / n of the message per rank (Thakur et al., Optimization of Collective Communication Operations in
MPICH, section 4). Ranks are numbered as in megatron-core: tp fastest, then cp, dp, pp. So groups with a small stride
lie within a server. A group that spans servers uses the network ports of all its members in a server. All groups of an
axis communicate at the same time, so the slowest placement sets the time.
"""

from math import gcd

from megabagel.planner.calibration import Calibration
from megabagel.planner.memory import stage_numbers
from megabagel.planner.scenario import Case


def bandwidth(case: Case, constants: Calibration, size: int, stride: int) -> float:
    """Bytes per second per rank in the worst-placed group of one parallel axis.

    A server has gpus_per_node / stride places for ranks of one group, and consecutive groups fill them in turn. If
    `size` divides the places, every group stays within a server. Otherwise some group has only gcd(size, places) of its
    ranks in one of its servers.

    Args:
        case: the run on its grid.
        constants: `link` is the share of the bandwidth that is reached.
        size: ranks of a group.
        stride: distance between rank numbers of neighbours in the group.
    """
    gpu = case.gpu
    places = 1 if gpu.gpus_per_node % stride else gpu.gpus_per_node // stride
    together = size if case.grid.gpus <= gpu.gpus_per_node else gcd(size, places)
    if together == size:
        return gpu.nvlink_gb_s * 1e9 * constants.link
    return min(gpu.nvlink_gb_s, together * gpu.network_gb_s) * 1e9 * constants.link


def collective(case: Case, constants: Calibration, size: int, stride: int, message: float) -> float:
    """Seconds of an all-gather or reduce-scatter; latency grows with the logarithm of the group.

    Args:
        case: the run on its grid.
        constants: shares of bandwidths and the latency.
        size: ranks of the group.
        stride: distance between rank numbers of neighbours in the group.
        message: bytes of the whole (gathered) tensor.
    """
    if size == 1:
        return 0.0
    wire = (size - 1) / size * message / bandwidth(case, constants, size, stride)
    return wire + constants.latency * max(1, (size - 1).bit_length())


def tensor_parallel(case: Case, constants: Calibration) -> tuple[float, float]:
    """Seconds (forward, backward) of one decoder layer's tensor-parallel collectives, each of R h.

    4 run in forward and 6 in backward. Of the latter, 2 gather the inputs for weight gradients; megatron-core overlaps
    those with the GEMM for the input gradient, so they are not counted. Recomputation repeats the forward ones.
    """
    message = case.load.rows * case.config.model.hidden * case.bytes
    one = collective(case, constants, case.grid.tp, 1, message)
    exposed = 1 - constants.hidden if case.system.overlaps_tensor else 1.0
    return 4 * one * exposed, (4 + 4 * case.full_layers) * one * exposed


def context_parallel(case: Case, constants: Calibration) -> tuple[float, float]:
    """Seconds (forward, backward) of one decoder layer: all-gather of K and V, reduce-scatter of their gradients.

    Backward gathers once more where attention is recomputed.
    """
    message = 2 * case.load.keys * case.k * case.bytes
    one = collective(case, constants, case.grid.cp, case.grid.tp, message)
    again = 1.0 if case.grid.recompute == "selective" else case.full_layers
    return one, one * (1 + again)


def wire(case: Case, constants: Calibration) -> float:
    """Seconds to send a micro-batch's hidden states to the next stage; 0 if interleaved, where other chunks hide it."""
    if case.grid.pp == 1 or case.grid.vpp > 1:
        return 0.0
    message = case.split_rows * case.config.model.hidden * case.bytes
    gpu = case.gpu
    # The slowest boundary between stages counts: in a job of several servers, that one crosses the network.
    link = gpu.nvlink_gb_s if case.grid.gpus <= gpu.gpus_per_node else gpu.network_gb_s
    return message / (link * 1e9 * constants.link) + constants.latency


def data_parallel(case: Case, constants: Calibration, rank: int, beside: float) -> float:
    """Exposed seconds per step of reducing gradients (fp32) and gathering weights over the replicas.

    A system that overlaps them hides up to one micro-batch, the one that produces the last gradients. With interleaving
    the chunks finish one after the other, over the last pp micro-batches. FSDP gathers weights twice and reduces
    gradients once per micro-batch.

    Args:
        case: the run on its grid.
        constants: shares of bandwidths and the latency.
        rank: pipeline rank.
        beside: seconds of one micro-batch on this rank, behind which communication can hide.
    """
    pp, vpp = case.grid.pp, case.grid.vpp
    numbers, size, stride = stage_numbers(case, rank), case.grid.replicas, case.grid.tp
    weights = collective(case, constants, size, stride, case.bytes * numbers.learning)
    gradients = collective(case, constants, size, stride, 4 * numbers.learning)
    if case.system.shards_weights:
        return max(0.0, case.micro_batches * (2 * weights + gradients) - beside * case.micro_batches)
    hidden = beside * (pp if vpp > 1 else 1) if case.system.overlaps_data else 0.0
    return max(0.0, weights + gradients - hidden)
