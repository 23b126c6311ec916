"""Pipeline stages: which layers a rank holds, and the model chunk as megatron-core's schedules want it."""

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
    """Layers of every stage in model order, pp * vpp ranges; earlier stages get the odd ones unless config says."""
    stages = config.parallel.pp * config.parallel.vpp
    layers = config.model.layers
    counts = config.parallel.layer_split or [(layers + stages - 1 - stage) // stages for stage in range(stages)]
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


class PipelineStage(nn.Module):
    """One model chunk: takes the wire of the stage before and gives the wire to the next, or outputs at the end."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: Bagel, config: TransformerConfig, width: int, vp_stage: int | None) -> None:
        super().__init__()
        self.model, self.config, self.width, self.vp_stage = model, config, width, vp_stage
        self._wire: torch.Tensor | None = None
        for tower in (module for module in model.modules() if isinstance(module, Vit)):
            _phase_of(tower, "vit")

    def set_input_tensor(self, wire: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """Called by the schedules before forward."""
        self._wire = wire[0] if isinstance(wire, list) else wire

    def forward(self, inputs: StageInputs) -> torch.Tensor | Outputs:
        """One micro-batch."""
        hidden = None
        if not self.model.first:
            assert self._wire is not None
            und_rows = len(inputs.word_U) // self.row_shards
            hidden = from_wire(self._wire, und_rows, self.width)
        result = self.model(inputs, hidden)
        return to_wire(result) if isinstance(result, Hidden) else result

    @property
    def row_shards(self) -> int:
        """Ways that rows are split between linears."""
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1


def _phase_of(module: nn.Module, name: str) -> None:
    """Make every forward of `module` a phase. By hooks, because modules of the model know nothing of a run."""
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
    """This rank's model chunks (vpp of them), initialised, in `train.precision`.

    Args:
        config: the run, whose grid `mesh` is.
        mesh: this rank's place.
        megatron: `megatron_config(config)`.
        kernels: the operations between the linears.
        draw: fill weights that start as random numbers; without, a checkpoint has to.
        device: where weights go in the end; None: this rank's device.
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
        chunks.append(PipelineStage(model, megatron, config.model.hidden, chunk if config.parallel.vpp > 1 else None))
    return chunks


def _to(model: Bagel, dtype: torch.dtype, device: torch.device) -> None:
    """Cast weights to the run's precision and move all; frozen position tables stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to(device)
