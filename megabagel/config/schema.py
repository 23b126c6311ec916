"""The whole run as one typed tree. Every field has a default, a meaning and, where it has one, a unit.

`load.py` reads YAML and overrides into this tree, `checks.py` holds the rules between fields. Classes are frozen: a
config is a value, made once and handed down.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it starts."""

    dir: str = "runs/default"
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/."""
    resume: str = "auto"
    """`auto`: newest complete checkpoint under run.dir, else a fresh start; `none`: fresh; else a checkpoint folder."""
    init_from: str | None = None
    """A fresh start takes its weights from this checkpoint (imported, or of an earlier stage): nothing else of it."""
    init_weights: Literal["trained", "ema"] = "trained"
    """Which weights of `init_from`: those in training, or the averaged ones (as fine-tuning from ema.safetensors)."""
    start_timeout: float = 300.0
    """Seconds that ranks wait for each other at the start; then the absent ones are named."""
    timeout: float = 600.0
    """Seconds without progress (a phase of a step, a checkpoint, the index at the start) after which the job ends,
    naming the rank that the others wait for."""
    heartbeat_timeout: float = 60.0
    """Seconds without a sign of life after which a rank counts as dead."""


@dataclass(frozen=True)
class VitConfig:
    """The NaViT tower (SigLIP layout; BAGEL section 2.2): native resolution, full attention inside each image."""

    layers: int = 2
    hidden: int = 96
    heads: int = 4
    ffn: int = 256
    patch: int = 14
    """Pixels per patch side."""
    grid: int = 70
    """Most patches per side; a patch at (row, col) has id row * grid + col."""
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class VaeConfig:
    """The frozen image codec whose latents are generated."""

    codec: Literal["blocks", "flux"] = "blocks"
    """`blocks`: exact training-free block transform; `flux`: the FLUX autoencoder, weights from `path`."""
    path: str | None = None
    """`ae.safetensors` for codec `flux`."""
    channels: int = 16
    downsample: int = 8
    """Pixels per latent side."""
    width: int = 128
    """flux: channels of the first level."""
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """flux: channel multiplier per level; the last level is not downsampled."""
    res_blocks: int = 2
    """flux: residual blocks per level."""
    scale: float = 0.3611
    """flux: x_0 = scale * (z - shift)."""
    shift: float = 0.1159


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the decoder-only Mixture-of-Transformers (BAGEL section 2; Qwen2.5 layout)."""

    variant: Literal["dense", "moe", "mot"] = "mot"
    """What the generation expert owns: nothing, its MLP, or every weight of a layer (BAGEL section 2.4, figure 3)."""
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    """Default: hidden / heads."""
    ffn: int = 256
    vocab: int = 512
    """Rows of the word embedding; at least the tokenizer's size."""
    qk_norm: bool = True
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    rope_base: float = 1e6
    rope_precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the rotary frequencies. bf16 is what FSDP's buffer cast makes of them in the released trainer: up to 1.15
    rad of phase at position 1000 (docs/bagel.md#precision); its inference uses fp32. Angles are fp32 in both."""
    init_std: float = 0.02
    visual_und: bool = True
    """Build the ViT tower and connector."""
    visual_gen: bool = True
    """Build the latent path: vae2llm, time embedder, llm2vae."""
    vit: VitConfig = field(default_factory=VitConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    latent_patch: int = 2
    """Latent cells per token side: one token covers latent_patch * vae.downsample pixels."""
    latent_grid: int = 64
    """Most latent tokens per side; a token at (row, col) has id row * latent_grid + col."""
    interpolate_pos: bool = False
    """Stretch 2-D ids over the whole grid instead of using its top left corner."""

    @property
    def kv_channels(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def latent_dim(self) -> int:
        """Numbers per latent token: channels * latent_patch**2 (64 in BAGEL)."""
        return self.vae.channels * self.latent_patch**2

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token side (16 in BAGEL)."""
        return self.latent_patch * self.vae.downsample


@dataclass(frozen=True)
class ParallelConfig:
    """How one step is spread over ranks. Data-parallel size = world size / (tp * pp * cp)."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline rank (interleaved schedule when > 1)."""
    cp: int = 1
    sp: bool = True
    """Sequence parallel: norms, residuals and the wire between stages hold 1/tp of the rows. No effect when tp = 1."""
    chunk: int = 128
    """Rows dealt to context-parallel ranks as a unit, and the multiple that each expert's rows are padded to."""
    layer_split: tuple[int, ...] | None = None
    """Layers per stage, pp * vpp numbers; default: as even as can be."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none, attention and SwiGLU, or whole layers."""
    attention: Literal["auto", "host", "triton", "flex", "fa4"] = "auto"
    """Engine. `triton`: our kernels, for GPUs; `flex`: torch's FlexAttention, fused on a GPU, forward only on a CPU;
    `fa4`: FlashAttention-4 through FlexAttention, where installed; `host`: exact attention on a CPU. `auto`: host on a
    CPU, triton on a GPU that it has kernels for, else flex."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes norms, rotation, SwiGLU, noise and losses. `auto`: triton on a GPU that it has kernels for."""

    @property
    def row_shards(self) -> int:
        """Ways that each expert's rows are split between the linears: tp under sequence parallelism, else 1."""
        return self.tp if self.sp else 1


@dataclass(frozen=True)
class SourceConfig:
    """One entry of the mixture: shards read as one kind of task."""

    name: str = ""
    path: str = ""
    """Glob of shards (WebDataset tars, parquet, JSONL) or a folder of them, relative to data.root."""
    task: Literal["t2i", "i2t", "edit", "video", "text", "interleave"] = "t2i"
    weight: float = 1.0
    images: str = ""
    """Folder of the images that JSONL files name, relative to data.root; default: the folder of the first file."""


@dataclass(frozen=True)
class ResizeConfig:
    """Resize rule of one visual branch (docs/bagel.md#image-sizes): sides become multiples of the branch's stride."""

    max_size: int = 1024
    min_size: int = 512
    max_pixels: int = 14 * 14 * 9 * 1024


@dataclass(frozen=True)
class DataConfig:
    """Samples, packing and conditioning dropout."""

    root: str = "."
    """Folder that source paths are relative to."""
    index_dir: str | None = None
    """Folder of cached indexes; default: `.index` beside the shards."""
    builder: Literal["none", "shapes", "scenes"] = "none"
    """Write a drawn data set under data.root on first use. `shapes`: one figure per page; `scenes`: one to four, with
    questions, edits of one among several and thoughts."""
    sources: tuple[SourceConfig, ...] = ()
    tokenizer: str = "bytes"
    """`bytes`, a `tokenizer.json` (or a folder holding one), or a sentencepiece `*.model`."""
    min_tokens: int = 448
    """A pack is closed once it holds this many tokens."""
    max_tokens: int = 512
    """A pack never holds more."""
    max_sample_tokens: int | None = None
    """Longer samples are skipped and counted; default max_tokens."""
    lookahead: int = 64
    """Samples the packer may choose from; the oldest comes first, so none is lost."""
    drop_text: float = 0.1
    drop_vit: float = 0.5
    drop_latent: float = 0.1
    """Conditioning dropout per item kind (BAGEL section 2.3)."""
    dropped_images_advance: bool = True
    """Whether an image that dropout leaves out still moves the RoPE counter by one, as in the released trainer (its
    inference leaves no such gap; docs/bagel.md#rope, #contexts). Dropped text never does."""
    vae_resize: ResizeConfig = field(default_factory=ResizeConfig)
    vit_resize: ResizeConfig = field(default_factory=lambda: ResizeConfig(max_size=518, min_size=224))
    decode: Literal["auto", "host", "dali"] = "auto"
    """Engine. `host`: Pillow, the reference; `dali`: NVIDIA DALI, on the GPU if there is one and no `workers`, else on
    the CPU. `auto`: dali when training on a GPU with DALI installed, else host."""
    decode_threads: int = 1
    """CPU threads of the engine, in every process that decodes."""
    latents: str | None = None
    """Folder of `megabagel data latents`: the codec's view of every image, read instead of decoded and encoded."""
    prefetch: int = 2
    """Steps prepared ahead; bounds the memory for them (docs/data.md)."""
    workers: int = 0
    """Processes of every rank that fill packs, beside one that plans; 0: a background thread does both."""
    worker_timeout: float = 120.0
    """Seconds that training waits for a worker before a warning names what it is at."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation (BAGEL table 3; docs/bagel.md#optimizer)."""

    steps: int = 100
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    packs_per_step: int = 4
    """Packs of one optimizer step over the whole job; divided by the data-parallel size: micro-batches per rank."""
    lr: float = 1e-3
    min_lr: float = 1e-7
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 20
    """Steps of linear warm-up from 0."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0
    """Global L2 norm of the gradient."""
    ema: float = 0.9999
    """Decay per step; 0 switches the averaged weights off."""
    ce_weight: float = 0.25
    mse_weight: float = 1.0
    timestep_shift: float = 1.0
    timestep_precision: Literal["fp32", "bf16"] = "fp32"
    """Type in which timesteps are shifted. bf16 is what FSDP's casts make of them in the released code: t then has 8
    significant bits (docs/bagel.md#precision)."""
    loss_normalization: Literal["global_batch", "micro_step"] = "global_batch"
    """What losses are divided by. `global_batch`: the loss tokens of the whole step, so that a step does not depend on
    how its packs are spread over micro-batches and ranks. `micro_step`: as released, the loss tokens of one micro-batch
    of all data-parallel ranks, then averaged over micro-batches (docs/bagel.md#losses): tokens weigh more in
    micro-batches that have few, and the curve depends on the data-parallel size."""
    freeze: tuple[Literal["llm", "vit", "connector", "latent", "und"], ...] = ()
    """Weights that do not learn. `llm`: the language model with embedding and head, both experts (freeze_llm). `vit`:
    the tower (freeze_vit). `connector`: between tower and language model. `latent`: vae2llm, time embedder, llm2vae.
    `und`: the understanding stream from embedding, tower and connector to the final norm, so that only generation and
    lm_head learn (freeze_und). The connector alone learns with [llm, vit, latent]. The VAE never learns."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What becomes of a step whose loss or gradient is NaN or infinite: the run ends, or it goes on without that
    update, or from the newest checkpoint with the data after this step (docs/faults.md)."""
    on_spike: Literal["record", "stop", "skip", "rollback"] = "record"
    """Policy for a step whose loss or gradient norm is a spike: `record` dumps its samples and keeps going; the others
    as above."""
    spike_sigma: float = 6.0
    """A spike is this many standard deviations above the mean of the `spike_window` steps before."""
    spike_window: int = 128
    """Steps; until there are so many, nothing is a spike."""
    spike_warmup: int = 500
    """Steps at the start of a run in which nothing is a spike: a fresh model's gradient norm still jumps."""
    max_rollbacks: int = 3
    """Rollbacks to one checkpoint; the next one ends the run."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is written."""

    every: int = 0
    """Steps between checkpoints; 0: only at the end of the run."""
    keep: int = 3
    """Newest complete checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good as well; 0: none."""
    async_save: bool = True
    """Copy the state to host memory and write it beside the next steps; else training waits until it is written."""


@dataclass(frozen=True)
class TelemetryConfig:
    """What a run says about itself."""

    log_every: int = 1
    """Steps between console lines; metrics.jsonl has every step."""
    tensorboard: bool = True
    sample_every: int = 0
    """Steps between sample images; 0: none."""
    prompts: tuple[str, ...] = ()
    sample_size: tuple[int, int] = (64, 64)
    """Height and width of sample images, pixels."""
    sample_steps: int = 25
    """Euler steps."""
    sample_guidance: float = 1.0
    """Classifier-free guidance on text; 1: none."""
    peak_tflops: float | None = None
    """Dense peak of one device for MFU; default: known for common GPUs, else measured by a matmul at start."""


@dataclass(frozen=True)
class Config:
    """The whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
