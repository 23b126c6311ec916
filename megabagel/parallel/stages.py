"""Pipeline stages: split of the layers, and the model chunks in the form that megatron-core's schedules call."""

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megabagel.config.schema import Config
from megabagel.model.bagel import Bagel
from megabagel.model.init_weights import initialize_weights
from megabagel.model.inputs import Hidden, Outputs, StageInputs
from megabagel.model.kernels import TORCH, Kernels
from megabagel.model.vit import Vit
from megabagel.parallel.linears import MegatronLayers
from megabagel.parallel.megatron import parameter_dtype
from megabagel.parallel.mesh import Mesh
from megabagel.parallel.stage_activations import from_wire, to_wire
from megabagel.runtime.device import current_device
from megabagel.runtime.phase import keepalive, phase


def layer_split(config: Config) -> list[range]:
    """Return the layers of each of the pp * vpp stages, in model order.

    Without `parallel.layer_split` the split is as even as possible, and earlier stages take the remainder.
    """
    stages = config.parallel.pp * config.parallel.vpp
    layers = config.model.layers
    counts = config.parallel.layer_split or [(layers + stages - 1 - stage) // stages for stage in range(stages)]
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


class PipelineStage(nn.Module):
    """One model chunk: input is the payload of the previous stage, output the next payload, or losses at the end.

    Args:
        model: the chunk's layers, with the input embedding or heads at the ends of the pipeline.
        config: megatron-core's config of the run.
        width: width of the hidden state.
        vp_stage: index of the chunk on this rank; None without an interleaved schedule.
        two_targets: `Config.two_targets`.
    """

    # megatron-core's schedules read `model_type`, `config` and `vp_stage` of the module and call `set_input_tensor`.
    model_type = ModelType.encoder_or_decoder

    def __init__(
        self, model: Bagel, config: TransformerConfig, width: int, vp_stage: int | None, two_targets: bool = False
    ) -> None:
        super().__init__()
        self.model, self.config, self.width, self.vp_stage = model, config, width, vp_stage
        self.two_targets = two_targets
        self._wire: torch.Tensor | None = None
        for tower in (module for module in model.modules() if isinstance(module, Vit)):
            _phase_of(tower, "vit")

    def set_input_tensor(self, wire: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """Store the payload of the previous stage; megatron-core's schedules call this before every forward."""
        self._wire = wire[0] if isinstance(wire, list) else wire

    def forward(self, inputs: StageInputs) -> torch.Tensor | Outputs:
        """Run one micro-batch.

        Returns:
            The payload for the next stage, or on the last stage the losses per row.
        """
        hidden = None
        if not self.model.first:
            assert self._wire is not None
            und_rows = len(inputs.word_U) // self.row_shards
            hidden = from_wire(self._wire, und_rows, self.width, self.two_targets)
        result = self.model(inputs, hidden)
        return to_wire(result, self.two_targets) if isinstance(result, Hidden) else result

    @property
    def row_shards(self) -> int:
        """Number of parts that rows are split into between linears: tp under sequence parallelism, else 1."""
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1


def _phase_of(module: nn.Module, name: str) -> None:
    """Enter the phase `name` (heartbeat, profiler range) during every forward of `module`."""
    # By hooks, because `megabagel.model` does not depend on the runtime. `always_call` leaves the phase after an error.
    entered = phase(name, counted=False)
    module.register_forward_pre_hook(lambda *_: entered.__enter__())
    module.register_forward_hook(lambda *_: entered.__exit__(None, None, None), always_call=True)


def build_stages(
    config: Config,
    mesh: Mesh,
    megatron: TransformerConfig,
    kernels: Kernels = TORCH,
    draw: bool = True,
    device: torch.device | None = None,
) -> list[PipelineStage]:
    """Build this rank's model chunks (vpp of them) with initial weights, in `train.precision`.

    Args:
        config: the run.
        mesh: this rank's place in the grid of `config`.
        megatron: `megatron_config(config)`.
        kernels: the operations between the linears.
        draw: whether to fill weights that start as random numbers; if not, a checkpoint has to.
        device: device of the weights; None: this rank's device.
    """
    factory = MegatronLayers(megatron, mesh, kernels)
    split = layer_split(config)
    chunks = []
    for chunk in range(config.parallel.vpp):
        stage = chunk * mesh.pp.size + mesh.pp.rank
        model = Bagel(
            config.model,
            factory,
            split[stage],
            first=stage == 0,
            last=stage == len(split) - 1,
            recompute=config.parallel.recompute,
            freeze=config.train.freeze,
        )
        initialize_weights(model, config.model, config.train.seed, draw, on_parameter=keepalive)
        _to(model, parameter_dtype(config), device or current_device())
        vp_stage = chunk if config.parallel.vpp > 1 else None
        chunks.append(PipelineStage(model, megatron, config.model.hidden, vp_stage, config.two_targets))
    return chunks


def _to(model: Bagel, dtype: torch.dtype, device: torch.device) -> None:
    """Cast parameters to the run's precision and move the whole chunk to `device`."""
    # Parameters only: `model.to(dtype)` would round the frozen position tables, which are fp32 buffers.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to(device)
