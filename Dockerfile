# Tandem with CUDA and headless rendering. Not built in CI: the checks run without a GPU and without an image registry.
#
#   docker build -t tandem .
#   docker run --rm --init --gpus all --stop-timeout 120 -v "$PWD/runs:/work/runs" tandem --config quickstart
#
# --init and --stop-timeout let `docker stop` end the run with a saved checkpoint.
ARG CUDA_IMAGE=nvidia/cuda:12.8.1-runtime-ubuntu24.04
FROM ${CUDA_IMAGE}

# g++ and python3-dev: torch.compile builds code at run time. The other libraries: MuJoCo renders through EGL.
RUN apt-get update && apt-get install --yes --no-install-recommends \
        python3 python3-dev python3-venv g++ git libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libgles2 libglvnd0 \
    && rm -rf /var/lib/apt/lists/*

# `graphics` makes the driver's EGL library visible in the container.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics \
    MUJOCO_GL=egl \
    PATH=/opt/tandem/bin:$PATH

RUN python3 -m venv /opt/tandem
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE launch.py ./
COPY configs configs
COPY shared shared
COPY launcher launcher
COPY collector_proc collector_proc
COPY learner_proc learner_proc
RUN pip install --no-cache-dir --constraint constraints.txt '.[gym,report]'

# Runs are written to runs/ below this folder.
WORKDIR /work
ENTRYPOINT ["tandem"]
CMD ["--help"]
