# For TPUs, as in launch/jobset.yaml. From the checkout:
#   docker build -f launch/tpu.Dockerfile -t REGION-docker.pkg.dev/PROJECT/REPOSITORY/ig_jax .
#   docker push REGION-docker.pkg.dev/PROJECT/REPOSITORY/ig_jax
FROM python:3.11-slim-bookworm
WORKDIR /opt/ig_jax
COPY pyproject.toml README.md LICENSE ./
COPY ig_jax ig_jax
COPY configs configs
# Versions are bounded in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[tpu]"
WORKDIR /work
# The program is process 1, so that it hears when it is asked to stop.
ENTRYPOINT ["ig-jax"]
CMD ["--help"]
