"""Write golden.json: digests of codes and factors as Transformer Engine's own reference quantizers make them.

    git clone --depth 1 --branch v2.11 https://github.com/NVIDIA/TransformerEngine
    python -m tests.kernels.float8.make_golden TransformerEngine/tests/pytorch

The references are plain torch and need nothing of Transformer Engine. Delayed scaling and MXFP8 have none there.
"""

import hashlib
import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from megabagel_kernels.float8 import E4M3, E5M2
from torch import Tensor

from tests.kernels.float8.cases import hashed

GOLDEN = Path(__file__).with_name("golden.json")
SHAPES, DTYPES, FORMATS = ((150, 140), (128, 256)), (torch.float32, torch.bfloat16), {"e4m3": E4M3, "e5m2": E5M2}


def digest(x: Tensor) -> str:
    """Of the bits of a matrix in row-major order."""
    flat = x.contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


def key(shape: tuple[int, int], dtype: torch.dtype, code: str, tiles: str) -> str:
    """Name of a case: "150x140 float32 e4m3 row"."""
    return f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} {code} {tiles}"


def main(references: str) -> None:
    """Run the references on `hashed` numbers."""
    sys.path.insert(0, references)
    blocks = import_module("references.blockwise_quantizer_reference").BlockwiseQuantizerReference
    scale_of = import_module("references.quantize_scale_calc").scale_from_amax_tensor
    options = {"return_transpose": True, "pow_2_scales": True, "eps": 0.0}
    found = {}
    for shape in SHAPES:
        for dtype in DTYPES:
            x = hashed(*shape, dtype)
            for name, code in FORMATS.items():
                rows = blocks._quantize_vector_tiling(x, code.dtype, 128, **options)
                square = blocks._quantize_square_block_tiling(x, code.dtype, 128, **options)
                cases = {"row": (rows.data, rows.scale), "column": (rows.data_t.T, rows.scale_t.T)}
                cases["square"] = square.data, square.scale
                # As ref_per_tensor_cs.py, which imports the compiled extension for the names of dtypes alone. Each row
                # is a tensor, for more than one scale.
                amax = x.float().abs().amax(1, keepdim=True)
                scale, factors, _ = scale_of(torch.float32, amax, code.dtype, eps=0.0, pow_2_scales=False)
                cases["tensor"] = (x.float() * scale).to(code.dtype), factors
                for tiles, (codes, factors) in cases.items():
                    found[key(shape, dtype, name, tiles)] = [digest(codes), digest(factors)]
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
