# For NVIDIA GPUs; the host needs the driver (580 or newer) and the NVIDIA container toolkit only, as
# CUDA comes with jax. From the checkout:
#   docker build -f launch/gpu.Dockerfile -t ig_jax .
#   docker run --gpus all -v /runs:/runs ig_jax --config=digits_ig --workdir=/runs/digits
FROM python:3.11-slim-bookworm
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/ig_jax
COPY pyproject.toml README.md LICENSE ./
COPY ig_jax ig_jax
COPY configs configs
# Versions are bounded in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[cuda13,hub]"
WORKDIR /work
# The program is process 1, so that it hears when it is asked to stop.
ENTRYPOINT ["ig-jax"]
CMD ["--help"]
