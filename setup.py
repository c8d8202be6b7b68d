"""Install metadata. Lower bounds are versions the tests have run with."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mpqdiff",
    version="0.1.0",
    description="Mixed-precision, timestep and token planning for diffusion models, in integers",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mpqdiff", "mpqdiff.*"]),
    package_data={"mpqdiff": ["weights/zoo/*", "report/*.jinja"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2",
        "orbax-checkpoint>=0.11",
        "aqtp>=0.9",  # the integer arithmetic the project was asked to offer
        "ml-collections>=1.0",
        "absl-py>=2.0",
        "tensorflow-datasets>=4.9.9",
        "array_record>=0.8",  # what TFDS reads and writes without TensorFlow
        "importlib_resources>=6.0",  # TFDS imports it and does not declare it on Python 3.11
        "safetensors>=0.5",
        "numpy>=2.0",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "plotly>=6.0",
        "pillow>=10.0",
        "jaxtyping>=0.3",
        "etils>=1.9",
    ],
    extras_require={
        "test": [
            "pytest>=8.0",
            "hypothesis>=6.100",
            "scipy>=1.13",  # HiGHS, the planner's oracle
            "qwix>=0.1.8",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "ruff>=0.9",
            "pyright>=1.1.390",
        ],
        "parity": ["torch", "diffusers"],  # agreement tests only; they skip where it is absent
        "qwix": ["qwix>=0.1.8"],  # export.to_qwix
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda12]>=0.10"],
        "aot": ["libtpu"],  # compiles for TPU topologies on a machine without one
        "colab": ["ipykernel>=6.29"],
        "tensorboard": ["tensorboardX>=2.6"],
    },
    entry_points={"console_scripts": ["mpqdiff=mpqdiff.cli:main"]},
)
