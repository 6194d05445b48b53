# The command `styleformer` with CUDA, and nvcc, which compiles the CUDA kernels on first use.
# docs/installation.md has the commands to build and run the image.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRAS=tensorboard,wandb,metrics,video,safetensors,onnx,hub,parquet,heic
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/styleformer
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && pip install ".[$EXTRAS]"

# Caches of downloads and compiled operators, writable for any user, also with `docker run --user`.
ENV HOME=/cache \
    DNNLIB_CACHE_DIR=/cache/dnnlib \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
RUN mkdir --mode=1777 /cache \
    && useradd --home-dir=/cache --no-create-home styleformer

USER styleformer
WORKDIR /workspace
ENTRYPOINT ["styleformer"]
CMD ["--help"]
